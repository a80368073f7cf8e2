"""Layers, batches and comparisons for the tests of the backends: in the interpreter and on a GPU for Triton."""

from __future__ import annotations

import dataclasses

import torch

from fanin.kernels import Backend, Layer, Update
from fanin.kernels.reference import Reference

BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
# labels, width, fan-in, batch, group: ragged sizes, every kind of K, one label, one document, several panels of documents
SHAPES = [
    (1, 5, 3, 1, 1),
    (70, 48, 7, 5, 1),
    (203, 300, 32, 64, 1),
    (64, 70000, 8, 3, 1),
    (130, 40, 33, 130, 1),
    (37, 48, 1, 5, 16),
    (203, 300, 40, 130, 16),
    (97, 64, 64, 100, 8),
    (70, 520, 512, 33, 64),
    (300, 200, 100, 48, 128),
    (50, 30, 12, 9, 3),
]
_TENSORS = ("weight", "index", "bias", "momentum", "bias_momentum", "compensation")
# Below float32, dL/dlogits are rounded to the 8 bits of a bfloat16 (and x, but here it is exact in them).
TOLERANCE = {FP32: 2e-6, BF16: 5e-3, FP8: 5e-3}
# Of stored codes: a rounding that tips over is a step of an eighth of the number at most in float8.
STORED = {BF16: 5e-3, FP8: 2e-2}


def case(
    labels: int,
    width: int,
    fan_in: int,
    batch: int,
    group: int,
    *,
    weights=FP32,
    momentum=None,
    kahan=False,
    bias=True,
    wide=False,
    rounded=True,
    seed=0,
) -> tuple[Layer, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer, x, and positives: none for most labels, every document for one, and the last label's last document.

    wide: int32 indices even where uint16 would do. rounded: x is exact in bfloat16 where the arithmetic will be.
    """
    generator = torch.Generator().manual_seed(seed + labels * width + group)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    index = torch.rand(-(-labels // group), width, generator=generator).topk(fan_in, dim=1).indices.sort(dim=1).values
    layer = Layer(
        weight=(0.3 * normal(labels, fan_in)).to(weights),
        index=index.to(torch.int32 if wide or width > 2**16 else torch.uint16),
        bias=normal(labels) - 2 if bias else None,
        group=group,
        momentum=None if momentum is None else (0.1 * normal(labels, fan_in)).to(momentum),
        bias_momentum=None if momentum is None or not bias else 0.1 * normal(labels),
        compensation=torch.zeros(labels, fan_in, dtype=BF16) if kahan else None,
    )
    y = torch.rand(labels, batch, generator=generator) < 0.02
    y[:-1:2] = False
    y[min(3, labels - 1)] = True
    y[labels - 1, batch - 1] = True
    x = normal(batch, width)
    return layer, x.to(BF16).float() if rounded and weights != FP32 else x, *y.nonzero(as_tuple=True)


def clone(layer: Layer, device: str = "cpu", wide: bool = False) -> Layer:
    """A copy on `device`; `wide`: its floats in float64, with which the reference is exact."""
    copies = {name: value.to(device, copy=True) for name in _TENSORS if (value := getattr(layer, name)) is not None}
    if wide:
        copies = {name: value.double() if value.is_floating_point() else value for name, value in copies.items()}
        copies.pop("compensation", None)
    return dataclasses.replace(layer, **{name: None for name in _TENSORS if name not in copies}, **copies)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected; infinite for what is not a number."""
    found, expected = found.cpu().double(), expected.cpu().double()
    assert found.shape == expected.shape
    value = ((found - expected).norm() / expected.norm().clamp(min=1e-6)).item()
    return value if value == value else float("inf")


def check_step(backend, device, shape, loss="bce", *, weights=FP32, steps=2, first=0, **options):
    """`steps` training steps of `backend` against the reference: exact (float64) for dx, the loss and the bias, and for
    float32 weights; what is stored below float32 must be, but for rounding noise in the gradient, the very same codes."""
    layer, x, labels, documents = case(*shape, weights=weights, **options)
    layer = dataclasses.replace(layer, first=first)
    there, tolerance = clone(layer, device), TOLERANCE[weights]
    reference = Reference()
    for step in range(steps):
        update = Update(lr=0.2, momentum=0.9, weight_decay=0.01, scale=1 / len(x), seed=step)
        given = x * (1 + step)
        exact, here = clone(layer, wide=True), clone(layer)
        dx, total = reference.step(given.double(), exact, labels, documents, update, loss, want_loss=True)
        reference.step(given, here, labels, documents, update, loss)
        found_dx, found = backend.step(
            given.to(device), there, labels.to(device), documents.to(device), update, loss, want_loss=True
        )
        assert found_dx.dtype == x.dtype
        assert found.dtype == torch.float64
        assert error(found_dx, dx) < tolerance
        assert error(found, total) < tolerance
        for name in ("bias", "bias_momentum"):
            if getattr(layer, name) is not None:
                assert error(getattr(there, name), getattr(exact, name)) < tolerance
        for name in ("weight", "momentum", "compensation"):
            stored, expected = getattr(there, name), getattr(here, name)
            if stored is None:
                continue
            if stored.dtype == FP32:
                assert error(stored, getattr(exact, name)) < tolerance
            elif name == "compensation":  # it makes up for the weight's rounding: their sum is what can be compared
                ours, theirs = (part.weight.float().cpu() + part.compensation.float().cpu() for part in (there, here))
                assert error(ours, theirs) < 2e-3
            else:
                # the random bits are the same, so only noise in the gradient can tip a rounding over
                assert error(stored, expected) < STORED[stored.dtype], name
                if layer.group == 1:
                    assert (stored.cpu().float() != expected.float()).double().mean() < 0.01
        layer = clone(there)


def check_rest(backend, device, shape, *, weights=FP32, counts=(1, 5), halves=True):
    """logits, gradients (`halves`: also each alone) and topk (the `counts` highest) against the reference in float64."""
    layer, x, _, _ = case(*shape, weights=weights)
    there, tolerance, reference = clone(layer, device), TOLERANCE[weights], Reference()
    exact = clone(layer, wide=True)
    z = reference.logits(x.double(), exact)
    found = backend.logits(x.to(device), there)
    assert found.dtype == x.dtype
    assert error(found, z) < tolerance
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    expected = reference.gradients(x.double(), g.double(), exact)
    both = backend.gradients(x.to(device), g.to(device), there)
    assert error(both[0], expected[0]) < tolerance
    assert error(both[1], expected[1]) < tolerance
    if halves:
        only_x = backend.gradients(x.to(device), g.to(device), there, need_weight=False)
        only_weight = backend.gradients(x.to(device), g.to(device), there, need_x=False)
        assert only_x[1] is None
        assert only_weight[0] is None
        assert error(only_x[0], expected[0]) < tolerance
        assert error(only_weight[1], expected[1]) < tolerance
    for count in {min(count, layer.labels) for count in counts}:
        scores, labels = backend.topk(x.to(device), there, count)
        assert labels.dtype == torch.int64
        highest = found.cpu().topk(count, dim=1).values
        torch.testing.assert_close(scores.cpu(), highest, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.cpu().gather(1, labels.cpu()), highest, rtol=1e-4, atol=1e-5)
        assert all(len(row.unique()) == count for row in labels.cpu())


def check_given_features(backend: Backend, device: str, shape: tuple[int, ...]) -> None:
    """A step leaves the gradient of features that are given, not learnt, out of dx, and does nothing else otherwise."""
    layer, x, labels, documents = case(*shape, momentum=FP32)
    learnt = shape[1] // 2
    found = []
    for limit in (None, learnt):
        own = dataclasses.replace(clone(layer, device), learnt=limit)
        dx, loss = backend.step(
            x.to(device), own, labels.to(device), documents.to(device), Update(lr=0.1, momentum=0.9), want_loss=True
        )
        assert dx.shape == (len(x), limit or x.shape[1])
        found.append((dx[:, :learnt], loss, own.weight, own.bias, own.momentum))
    for whole, part in zip(*found, strict=True):
        assert torch.equal(whole, part)
