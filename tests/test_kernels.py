"""Every backend against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch

from fanin.kernels import BACKENDS, backend, reference

SHAPES = [(1, 5, 3, 2, 1), (37, 48, 7, 5, 1), (64, 300, 8, 3, 16), (37, 48, 7, 5, 16), (5, 4, 4, 1, 8)]


def case(labels: int, width: int, fan_in: int, batch: int, group: int, dtype=torch.float64, index_dtype=torch.int64):
    generator = torch.Generator().manual_seed(labels * width + group)
    index = torch.rand(-(-labels // group), width, generator=generator).topk(fan_in, dim=1).indices.to(index_dtype)
    weight = torch.randn(labels, fan_in, generator=generator, dtype=dtype)
    xt = torch.randn(width, batch, generator=generator, dtype=dtype)
    g = torch.randn(labels, batch, generator=generator, dtype=dtype)
    return xt, weight, index, g


def by_autograd(xt, weight, index, g, group):
    """dense [L, D] weights and autograd: only a test may do that."""
    rows = reference.expand(index, len(weight), group)
    weight, xt = weight.clone().requires_grad_(), xt.clone().requires_grad_()
    dense = torch.zeros(len(weight), len(xt), dtype=weight.dtype).scatter(1, rows, weight)
    z = dense @ xt
    z.backward(g)
    return z.detach(), weight.grad, xt.grad


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_autograd_in_fp64(name, shape):
    xt, weight, index, g = case(*shape)
    group = shape[-1]
    z, dw, dx = by_autograd(xt, weight, index, g, group)
    module = backend(name)
    torch.testing.assert_close(module.forward(xt, weight, index, group), z)
    torch.testing.assert_close(module.weight_gradient(xt, g, index, group), dw)
    base = torch.randn_like(xt)
    total = base.clone()
    module.add_input_gradient(total, g, weight, index, group)
    torch.testing.assert_close(total, base + dx)


@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
@pytest.mark.parametrize("group", [1, 16])
def test_fp32_and_every_index_type(index_dtype, group):
    xt, weight, index, g = case(130, 200, 32, 9, group, torch.float32, index_dtype)
    exact = by_autograd(xt.double(), weight.double(), index, g.double(), group)
    module = backend()
    dx = torch.zeros_like(xt)
    module.add_input_gradient(dx, g, weight, index, group)
    found = module.forward(xt, weight, index, group), module.weight_gradient(xt, g, index, group), dx
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-4)


def test_unread_features_get_no_gradient():
    xt, weight, index, g = case(10, 64, 3, 4, 1)
    dx = torch.zeros_like(xt)
    backend().add_input_gradient(dx, g, weight, index, 1)
    unread = torch.ones(64, dtype=torch.bool)
    unread[index.unique()] = False
    assert unread.any()
    assert (dx[unread] == 0).all()
    assert (dx[~unread] != 0).any()


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"kernel backend 'cuda' is not one of auto, reference"):
        backend("cuda")
