"""Prune and regrow the weights of a `FixedFanInLinear` between two steps of anyone's training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fanin import rewiring
from fanin.linear.operators import no_autocast


class Rewirable(Protocol):
    """What rewiring asks of a layer."""

    weight: nn.Parameter
    in_features: int
    out_features: int
    group: int

    @property
    def index(self) -> Tensor: ...

    def row_chunks(self) -> Iterator[tuple[int, int]]: ...

    def outputs_of(self, start: int, stop: int) -> slice: ...


@dataclass
class Captured:
    """What `FixedFanInLinear.capture` saw: x [.., D] and dL/dz [.., L] of the last backward pass, None before it."""

    x: Tensor | None = None
    grad_output: Tensor | None = None


@contextlib.contextmanager
def capture(layer: nn.Module) -> Iterator[Captured]:
    """As FixedFanInLinear.capture."""
    seen = Captured()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("capture() needs the model itself, not what torch.compile made of it: model._orig_mod")
        x = (inputs[0] if inputs else named["x"]).detach()

        def keep_gradient(gradient: Tensor) -> None:
            seen.x, seen.grad_output = x, gradient.detach()

        if output.requires_grad:
            output = output.clone() if output._is_view() else output  # changed in place, a view would lose the hook
            output.register_hook(keep_gradient)
        return output

    handle = layer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def rewire(
    layer: Rewirable,
    fraction: float,
    method: str,
    x: Tensor | None,
    grad_output: Tensor | None,
    optimizer: torch.optim.Optimizer | None,
    generator: torch.Generator | None,
    process_group: dist.ProcessGroup | None,
) -> dict[str, int]:
    """As FixedFanInLinear.rewire."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be 0 to 1, found {fraction}")
    if method not in ("set", "rigl"):
        raise ValueError(f"method {method!r} is not one of set, rigl")
    gradient = _dense_gradient(layer, x, grad_output) if method == "rigl" else None
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    if not alone and process_group is None and (gradient is not None or generator is None):
        raise ValueError(
            "replicas would rewire apart: pass process_group, such as dist.group.WORLD "
            "(for method set a generator, of the same seed everywhere, will do)"
        )
    tensors = [layer.weight.detach(), *_followers(layer, optimizer)]
    pruned = moved = 0
    for start, stop in layer.row_chunks():
        rows, outputs = layer.index[start:stop], layer.outputs_of(start, stop)
        mask = rewiring.pruned_mask(magnitude(layer.weight[outputs], layer.group), "fraction", fraction)
        if gradient is not None:
            score = gradient(outputs)
        else:
            score = random_scores(stop - start, layer, generator)
        if process_group is not None:
            dist.all_reduce(score, group=process_group)
        if gradient is not None:
            score = rewiring.magnitude(score, layer.group)
        new = rewiring.regrow(rows, mask, score)
        moved += rewiring.move_(rows, new, mask, [tensor[outputs] for tensor in tensors], layer.group)
        pruned += int(mask.sum())
    return {"entries": layer.index.numel(), "pruned": pruned, "moved": moved}


def magnitude(weight: Tensor, group: int) -> Tensor:
    """rewiring.magnitude, at least in float32: squares would leave a smaller type's range."""
    return rewiring.magnitude(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), group)


def random_scores(rows: int, layer: Rewirable, generator: torch.Generator | None) -> Tensor:
    """[rows, D] uniform on the layer's device, the same whatever device that is if the generator is."""
    device = layer.weight.device
    drawn_on = device if generator is None else generator.device
    return torch.rand(rows, layer.in_features, generator=generator, device=drawn_on).to(device)


def _dense_gradient(layer: Rewirable, x: Tensor | None, grad_output: Tensor | None) -> Callable[[slice], Tensor]:
    """A function: a run of outputs -> dL/dW as if they were dense, float32 [outputs, D]."""
    if x is None or grad_output is None:
        raise ValueError("method rigl needs x [.., D] and grad_output [.., L] of a step: see FixedFanInLinear.capture")
    if x.shape != (*grad_output.shape[:-1], layer.in_features) or grad_output.shape[-1:] != (layer.out_features,):
        raise ValueError(
            f"x must be [.., {layer.in_features}] and grad_output [.., {layer.out_features}], "
            f"found {list(x.shape)} and {list(grad_output.shape)}"
        )
    if not x.numel():
        raise ValueError("x is empty; method rigl needs the gradient of at least one example")
    for name, tensor in (("x", x), ("grad_output", grad_output)):
        if tensor.device != layer.weight.device:
            raise ValueError(
                f"{name} is on {tensor.device} but the layer on {layer.weight.device}; move one of them with .to()"
            )
        if not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor)):
            raise ValueError(f"{name} holds NaN or infinite values; rewire after a step whose gradients are finite")
    inputs = x.detach().reshape(-1, layer.in_features).to(torch.float32)
    outer = grad_output.detach().reshape(-1, layer.out_features).t()

    def chunk(outputs: slice) -> Tensor:
        with no_autocast(inputs.device.type):
            return outer[outputs].to(torch.float32) @ inputs

    return chunk


def _followers(layer: Rewirable, optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """What else holds a number for each weight [L, K]: the gradient, and the optimiser's momenta."""
    weight = layer.weight
    if weight.grad is not None:
        yield weight.grad
    if optimizer is None:
        return
    if not any(parameter is weight for options in optimizer.param_groups for parameter in options["params"]):
        raise ValueError("the optimizer does not hold this layer's weight; pass the one that does")
    for name, value in optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            if not value.is_floating_point():
                raise ValueError(f"the optimizer's {name} is {value.dtype}: quantised state cannot follow single weights")
            yield value
