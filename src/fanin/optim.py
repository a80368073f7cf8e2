"""Schedules and the encoder's optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHUNK = 2**20  # entries that `AdamWBf16` updates at once
_HIGH = -(2**16)  # the bits of a float32 that bfloat16 keeps
_OUTLIER = 3.0  # times a batch's median gradient, which one document's may not exceed


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on a learning rate at optimiser step `step` from 0: linear over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def limit_outliers(gradient: Tensor, own: Tensor, everyone: Tensor) -> None:
    """Shorten, in place, the rows of documents whose gradient is longer than `_OUTLIER` times the batch's median.

    gradient [b, D]: the loss by what the encoder made of a rank's documents; own [b], everyone [B]: the lengths of its rows,
    and of the rows of all ranks.
    The loss sums over labels: a document of hundreds of them, or one that hundreds of rows fire on by mistake, outweighs its
    whole batch, and makes Adam's second moment so large that the encoder all but stands still for the next thousand steps.
    Documents without a gradient do not count. Clipping by example: Abadi et al., CCS 2016; a limit that follows the data:
    Seetharaman et al., MLSP 2020.
    """
    limit = _OUTLIER * everyone.masked_fill(everyone == 0, math.nan).nanmedian().nan_to_num(nan=math.inf)
    gradient.mul_((limit / own.clamp_min(torch.finfo(own.dtype).tiny)).clamp_(max=1)[:, None])


def adamw(
    groups: list[tuple[nn.Module | None, float]], weight_decay: float, moments: str = "fp32", seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW over (module, learning rate) pairs; biases and norms are not decayed. `initial_lr` holds each group's peak rate.

    moments: fp32, or bf16 for `AdamWBf16`, whose rounding `seed` decides.
    """
    parameters: list[dict[str, Any]] = []
    for module, lr in groups:
        if module is None:
            continue
        trained = [p for p in module.parameters() if p.requires_grad]
        for decay, chosen in (
            (weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if chosen:
                parameters.append({"params": chosen, "lr": lr, "initial_lr": lr, "weight_decay": decay})
    if MOMENTS[moments] == torch.bfloat16:
        return AdamWBf16(parameters, seed=seed)
    # fused: one pass over weights and moments; four times faster than the default on a CPU
    return torch.optim.AdamW(parameters, fused=True)


class AdamWBf16(torch.optim.Optimizer):
    """torch.optim.AdamW with both moments in bfloat16, rounded stochastically: 4 bytes of state a weight instead of 8.

    Arithmetic is float32, a chunk at a time. Rounded to nearest, the second moment would stand still: a step changes it by a
    thousandth, bfloat16 tells apart steps of 1/256. The random bits are a function of (seed, step), drawn once a step and
    shared by all chunks: errors are unbiased, and independent from step to step, which is what counts.
    Source: Loshchilov & Hutter, ICLR 2019; stochastic rounding: Gupta et al., ICML 2015.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter (float32) that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        noise: dict[tuple[torch.device, int], Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                step = int(state["step"])
                key = parameter.device, step
                if key not in noise:
                    noise[key] = self._noise(parameter.device, step)
                _update(parameter, parameter.grad, state, group, step, noise[key])
        return loss

    def _noise(self, device: torch.device, step: int) -> Tensor:
        generator = torch.Generator(device).manual_seed((self.seed << 32) + step)
        return torch.randint(-(2**31), 2**31, (CHUNK,), dtype=torch.int32, device=device, generator=generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which reads moments in the parameters' type: they are put back to bfloat16, which loses nothing."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def _update(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int, noise: Tensor
) -> None:
    (beta1, beta2), lr = group["betas"], group["lr"]
    correction = math.sqrt(1 - beta2**step)
    parts = [_rows(tensor) for tensor in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])]
    entries = max(parts[0][0].numel(), 1)
    rows = max(CHUNK // entries, 1)
    for start in range(0, len(parts[0]), rows):
        weight, slope, kept_mean, kept_square = (part[start : start + rows] for part in parts)
        own = noise if weight.numel() <= CHUNK else noise.repeat(-(-weight.numel() // CHUNK))
        bits = own[: weight.numel()].view(weight.shape)
        mean = kept_mean.float().lerp_(slope, 1 - beta1)
        square = kept_square.float().mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
        if group["weight_decay"]:
            weight.mul_(1 - lr * group["weight_decay"])
        weight.addcdiv_(mean, square.sqrt().div_(correction).add_(group["eps"]), value=-lr / (1 - beta1**step))
        _round(mean, bits & 0xFFFF, kept_mean)
        _round(square, (bits >> 16) & 0xFFFF, kept_square)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _round(values: Tensor, bits: Tensor, target: Tensor) -> None:
    """Write float32 `values` to `target` in bfloat16, up or down by 16 random bits; `bits` is overwritten."""
    target.copy_(bits.add_(values.view(torch.int32)).bitwise_and_(_HIGH).view(torch.float32))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All groups' parameters, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
