"""What every backend works on: a fixed fan-in layer's tensors, one SGD update, and how numbers below fp32 are rounded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOSSES = ("bce", "squared_hinge")
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
INDEX_TYPES = (torch.uint16, torch.int32)
FAN_IN_LIMIT = 512
_FP8_HIGHEST = 448.0
_MASK = 0xFFFFFFFF


def index_dtype(width: int) -> torch.dtype:
    """The smallest integer type of the kernels that holds feature numbers 0..width-1."""
    return torch.uint16 if width <= 2**16 else torch.int32


class Unavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


@dataclass(frozen=True)
class Layer:
    """A fixed fan-in layer, or a run of its labels: views, never copies.

    z[b, l] = bias[l] + sum_k weight[l, k] * x[b, index[l // group, k]]

    weight [L, K] float32, bfloat16 or float8_e4m3fn; index [ceil(L / G), K] uint16 or int32, distinct in each row;
    bias [L] float32 or None. The optimiser's state, where there is any: momentum [L, K] float32 or bfloat16,
    bias_momentum [L] float32, compensation [L, K] bfloat16 (Kahan summation instead of stochastic rounding).
    first: the number of the first label in the whole layer, so that random numbers do not depend on how it was cut; every
    other label number is counted from the layer's (or the part's) own first row.
    learnt: features from this number on are given, not learnt (words): `step` returns dx of those before it alone.
    """

    weight: Tensor
    index: Tensor
    bias: Tensor | None = None
    group: int = 1
    momentum: Tensor | None = None
    bias_momentum: Tensor | None = None
    compensation: Tensor | None = None
    first: int = 0
    learnt: int | None = None

    @property
    def labels(self) -> int:
        return self.weight.shape[0]

    @property
    def fan_in(self) -> int:
        return self.weight.shape[1]

    def part(self, start: int, stop: int) -> Layer:
        """Labels start..stop-1; start is a multiple of the group size, and so is stop unless it is the last."""
        cut = {
            name: value[start:stop]
            for name in ("weight", "bias", "momentum", "bias_momentum", "compensation")
            if (value := getattr(self, name)) is not None
        }
        rows = self.index[start // self.group : -(-stop // self.group)]
        return replace(self, index=rows, first=self.first + start, **cut)

    def parts(self, size: int) -> Iterator[Layer]:
        """Runs of about `size` labels, whole groups, in order."""
        size = -(-size // self.group) * self.group
        for start in range(0, self.labels, size):
            yield self.part(start, min(start + size, self.labels))


def without_lowest(scores: Tensor) -> Tensor:
    """The lowest float32 turned into -inf, in place: top-k's kernels write that for a label whose logit is -inf, which must not
    tie with what lies beyond the last label.
    """
    return scores.masked_fill_(scores == torch.finfo(torch.float32).min, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One SGD update as torch.optim.SGD makes it.

    lr, momentum, weight_decay; scale: a factor on the gradient (1 / B makes it that of a mean); seed: of stochastic
    rounding, another one every step.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    scale: float = 1.0
    seed: int = 0

    def seeds(self) -> tuple[int, int]:
        """The 32-bit seeds of the weights' and of the momentum's random bits."""
        own = mix(self.seed)
        return own, own ^ _MOMENTUM_STREAM

    def apply(self, weight: Tensor, gradient: Tensor, momentum: Tensor | None, decay: bool = True) -> None:
        """Update `weight` in place (float32 or float64, or below: rounded to nearest); `gradient` is overwritten."""
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        if decay and self.weight_decay:
            gradient.add_(weight, alpha=self.weight_decay)
        if momentum is not None:
            gradient = momentum.mul_(self.momentum).add_(gradient)
        weight.add_(gradient, alpha=-self.lr)

    def apply_rounded(self, layer: Layer, gradient: Tensor) -> None:
        """Update layer.weight from `gradient` [L, K] float32, which is overwritten, whatever it is stored in.

        float32 as `apply`. Below it the sum is made in float32 and rounded stochastically (unbiased; Gupta et al., ICML
        2015), or to nearest with the loss carried over where the layer has a compensation (Kahan summation).
        """
        weight, momentum = layer.weight, layer.momentum
        if weight.itemsize >= 4 and (momentum is None or momentum.dtype == weight.dtype):
            self.apply(weight, gradient, momentum)
            return
        old = decode(weight)
        gradient.mul_(self.scale)
        if self.weight_decay:
            gradient.add_(old, alpha=self.weight_decay)
        if momentum is not None:
            gradient.add_(decode(momentum), alpha=self.momentum)
            store(momentum, gradient, random_bits(self.seeds()[1], layer))
        if layer.compensation is None:
            store(weight, old.sub_(gradient, alpha=self.lr), random_bits(self.seeds()[0], layer))
        else:
            change = layer.compensation.to(old.dtype).sub_(gradient, alpha=self.lr)
            store(weight, old + change, None)
            layer.compensation.copy_(change.sub_(decode(weight).sub_(old)))


class Backend(ABC):
    """One implementation of the arithmetic. Each of its methods is whole: no [B, L] and no [L, D] array is made in it,
    but for the logits that `logits` returns."""

    name: str

    @abstractmethod
    def step(
        self,
        x: Tensor,
        layer: Layer,
        labels: Tensor,
        documents: Tensor,
        update: Update,
        loss: str = "bce",
        want_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Forward, backward and update in one pass over the labels.

        x [B, D]; (labels, documents) [P] int64 are the positives, each once, sorted by label.
        Returns dx [B, D] like x (or [B, layer.learnt]), taken with the weights from before the update and not scaled, and,
        if `want_loss`, the loss [] float64, summed over labels and documents. `layer` is updated in place.
        """

    @abstractmethod
    def logits(self, x: Tensor, layer: Layer) -> Tensor:
        """x [B, D] -> z [B, L] in x's type."""

    @abstractmethod
    def gradients(
        self, x: Tensor, g: Tensor, layer: Layer, need_x: bool = True, need_weight: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """g = dL/dz [B, L] -> (dL/dx [B, D], dL/dweight [L, K]) in x's type; None for what is not needed."""

    @abstractmethod
    def step_bytes(self, *, labels: int, features: int, fan_in: int, group: int, batch: int, learnt: int | None = None) -> int:
        """What `step` allocates at its highest, beside what it is given: for the memory plan."""

    @abstractmethod
    def topk(self, x: Tensor, layer: Layer, k: int) -> tuple[Tensor, Tensor]:
        """x [B, D] -> (scores [B, k], labels [B, k] int64), highest first, exact; 1 <= k <= L."""

    @abstractmethod
    def candidates(self, x: Tensor, layer: Layer, labels: Tensor, documents: Tensor, count: int, loss: str = "bce") -> Tensor:
        """What RigL may regrow: for each index row the `count` features with the largest dense gradient that it does not read.

        Arguments as in `step`. Returns int32 [ceil(L / G), count], largest first, -1 where a row has no more; a group goes
        by the norm over its labels. In chunks of rows with a running best over the features, and only when one rewires.
        Source: Evci et al., ICML 2020.
        """


# Storage ------------------------------------------------------------------------------------------------------------

_MOMENTUM_STREAM = 0x5BD1E995


def mix(value: int) -> int:
    """A 32-bit integer hash (the finaliser of MurmurHash3)."""
    value &= _MASK
    value = ((value ^ value >> 16) * 0x85EBCA6B) & _MASK
    value = ((value ^ value >> 13) * 0xC2B2AE35) & _MASK
    return value ^ value >> 16


def random_bits(seed: int, layer: Layer) -> Tensor:
    """32 random bits for each weight, int64 [L, K]: a function of the seed and the weight's place alone.

    Every backend computes the same ones, so results can be compared bit for bit.
    """
    shape, device = layer.weight.shape, layer.weight.device
    place = torch.arange(shape.numel(), device=device).view(shape).add_(layer.first * layer.fan_in)
    value = ((place & _MASK) * 0x9E3779B1) ^ ((place >> 32) * 0x85EBCA77) ^ seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        value.bitwise_and_(_MASK)
        value.bitwise_xor_(value >> shift).mul_(factor)
    return value.bitwise_and_(_MASK)


def raw(stored: Tensor) -> Tensor:
    """The same memory as integers, which rows can be taken from and put into: fp8 and uint16 have no such operations."""
    return stored.view({1: torch.uint8, 2: torch.int16}.get(stored.itemsize, stored.dtype))


def decode(stored: Tensor) -> Tensor:
    """A copy in float32 (float64 stays)."""
    return stored.clone() if stored.dtype == torch.float64 else stored.to(torch.float32, copy=True)


def store(target: Tensor, values: Tensor, bits: Tensor | None) -> None:
    """Write float32 `values` to `target` in its own type; where that is below float32, rounded by `bits`, None: to nearest."""
    if target.dtype == torch.float8_e4m3fn:
        values = values.clamp(-_FP8_HIGHEST, _FP8_HIGHEST)
    if bits is None or target.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        target.copy_(values)
        return
    raw = values.view(torch.int32).to(torch.int64)
    if target.dtype == torch.bfloat16:
        target.copy_(((raw + (bits & 0xFFFF)) & ~0xFFFF).to(torch.int32).view(torch.float32))
        return
    size, noise = raw & 0x7FFFFFFF, bits & 0xFFFFF
    normal = ((size + noise) >> 20) - (120 << 3)
    subnormal = (values.abs() * 512 + noise.to(torch.float32) * 2.0**-20).to(torch.int64)
    code = torch.where(size < 121 << 23, subnormal, normal).clamp_(max=0x7E)
    target.view(torch.uint8).copy_(code | (raw >> 24 & 0x80))
