"""The fixed fan-in layer as PyTorch operators: differentiable (twice too), and opaque to torch.compile.

    fanin::fixed_fan_in_linear(x [B, D], weight [L, K], index [ceil(L / G), K], bias [L] or None, group, backend) -> [B, L]
    fanin::fixed_fan_in_linear_backward(g [B, L], ...) -> (dL/dx [B, D], dL/dweight [L, K])

The operators trust their input (`FixedFanInLinear` checks it): indices in 0..D-1, distinct in each row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fanin import kernels


@torch.library.custom_op("fanin::fixed_fan_in_linear", mutates_args=())
def forward(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, group: int, backend: str) -> Tensor:
    if not len(x):
        return x.new_empty(0, len(weight))
    inside = bias is not None and bias.dtype == torch.float32  # what every backend takes
    layer = kernels.Layer(weight.contiguous(), index.contiguous(), bias if inside else None, group)
    with no_autocast(x.device.type):
        z = kernels.backend(backend, weight.device, weight.dtype).logits(x.contiguous(), layer).contiguous()
    return z if inside or bias is None else z.add_(bias)


@torch.library.custom_op("fanin::fixed_fan_in_linear_backward", mutates_args=())
def backward(
    g: Tensor, x: Tensor, weight: Tensor, index: Tensor, group: int, backend: str, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """What is not needed is returned with no elements."""
    if not len(x):
        return torch.zeros_like(x) if need_x else x.new_empty(0), weight.new_zeros(weight.shape if need_weight else 0)
    layer = kernels.Layer(weight.contiguous(), index.contiguous(), group=group)
    with no_autocast(x.device.type):
        run = kernels.backend(backend, weight.device, weight.dtype)
        dx, dweight = run.gradients(x.contiguous(), g.contiguous(), layer, need_x, need_weight)
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dweight is None else dweight.to(weight.dtype)


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """For code that chooses its own precision: autocast would cast the matrix products in it."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


@forward.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, group: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@backward.register_fake
def _(
    g: Tensor, x: Tensor, weight: Tensor, index: Tensor, group: int, backend: str, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, index, bias, ctx.group, ctx.backend = inputs
    ctx.save_for_backward(x, weight, index)
    ctx.bias_type = None if bias is None else bias.dtype


def _differentiate_forward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, index = ctx.saved_tensors
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    dx = dweight = None
    if need_x or need_weight:
        dx, dweight = backward(g, x, weight, index, ctx.group, ctx.backend, need_x, need_weight)
    dbias = g.sum(0, dtype=ctx.bias_type) if need_bias else None
    return dx if need_x else None, dweight if need_weight else None, None, dbias, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    g, x, weight, index, ctx.group, ctx.backend, ctx.need_x, ctx.need_weight = inputs
    ctx.save_for_backward(g, x, weight, index)


def _differentiate_backward(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """The layer is linear in x and in the weight, so its second derivatives are the same two operators again.

    u [B, D] and v [L, K] are the gradients for dL/dx and dL/dweight.
    """
    g, x, weight, index = ctx.saved_tensors
    need_g, need_x, need_weight, *_ = ctx.needs_input_grad
    shared = (ctx.group, ctx.backend)
    dg = dx = dweight = None
    if ctx.need_x and need_g:
        dg = forward(u, weight, index, None, *shared)
    if ctx.need_weight and need_g:
        second = forward(x, v, index, None, *shared)
        dg = second if dg is None else dg + second
    if ctx.need_x and need_weight:
        dweight = backward(g, u, weight, index, *shared, False, True)[1]
    if ctx.need_weight and need_x:
        dx = backward(g, x, v, index, *shared, True, False)[0]
    return dg, dx, dweight, None, None, None, None, None


forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
backward.register_autograd(_differentiate_backward, setup_context=_save_backward)

fixed_fan_in_linear: Callable[..., Tensor] = forward
