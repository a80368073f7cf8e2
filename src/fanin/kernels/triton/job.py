"""What a call of the `triton` backend makes before its first launch, and the sum of dx that it builds up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fanin.kernels.layer import Layer, Update
from fanin.kernels.triton import configs
from fanin.kernels.triton.order import Order
from fanin.kernels.triton.plan import RUN, Plan


def raw(stored: Tensor, interpreted: bool) -> Tensor:
    """The view of a stored tensor that the kernels take: float8_e4m3fn as uint8, in the interpreter bfloat16 as int16."""
    if stored.dtype == torch.float8_e4m3fn:
        return stored.view(torch.uint8)
    return stored.view(torch.int16) if interpreted and stored.dtype == torch.bfloat16 else stored


def seeds(seed: int) -> tuple[int, ...]:
    """The seeds of the weights' and the momentum's random bits, as int32: so a kernel is compiled once for all."""
    return tuple(value - 2**32 if value >= 2**31 else value for value in Update(lr=0.0, seed=seed).seeds())


class Job:
    """A layer, x turned round and padded, and the plan for their shapes.

    xt [D, stride]: float32 for float32 weights, else bfloat16; rows are whole blocks of documents, so that every gathered
    row is aligned and no load of it is masked. The pads are zeros.
    """

    def __init__(self, x: Tensor, layer: Layer, capability: int) -> None:
        wide = layer.weight.dtype == torch.float32
        self.x, self.layer = x, layer
        self.plan = Plan(layer.labels, x.shape[1], layer.fan_in, layer.group, len(x), wide, capability, layer.learnt)
        self.dtype = torch.float32 if wide else torch.bfloat16
        self.xt = torch.zeros(self.plan.features, self.plan.stride, dtype=self.dtype, device=x.device)
        self.xt[:, : len(x)] = x.detach().t()

    def empty(self, rows: int) -> Tensor:
        return torch.empty(rows, self.plan.stride, dtype=self.dtype, device=self.x.device)

    def ranges(self, labels: Tensor) -> Tensor:
        """Where in the sorted `labels` each tile's positives begin, and their end: int64 [tiles + 1]."""
        plan = self.plan
        tile = torch.arange(plan.tiles(plan.labels) + 1, device=labels.device)
        begin = tile // plan.tiles_per_group * plan.group + tile % plan.tiles_per_group * plan.tile
        if plan.group == 1:
            begin = tile * plan.tile
        return torch.searchsorted(labels, begin.clamp_(max=plan.labels))


class InputGradient:
    """dx while it is summed over chunks of labels: deterministic partial sums [slices, D, stride], or one for atomics. The
    former leave out features that are given, not learnt.

    rows: what the grouped kernel leaves to be summed; atomic: what kernels add to, None where the sum is deterministic.
    kernels: `reduce` and `spread`.
    """

    def __init__(
        self,
        job: Job,
        deterministic: bool,
        order: Order | None,
        chunk: int,
        kernels: tuple[Any, Any],
        launch: Callable[..., None],
    ) -> None:
        plan = job.plan
        self.order = order
        self._job, self._launch = job, launch
        self._reduce, self._spread = kernels
        slices = plan.slices(chunk) if deterministic else 1
        features = plan.dx_features if deterministic else plan.features
        self._partial = torch.zeros(slices, features, plan.stride, dtype=torch.float32, device=job.x.device)
        self.atomic = None if deterministic else self._partial[0]
        self.rows: Tensor | None = None
        if deterministic and plan.group > 1:
            self.rows = job.empty(plan.tiles(min(chunk, plan.labels)) * plan.fan_in)
        self._tiles: Tensor | None = None

    def add(self, part: Layer, g: Tensor | None, weight: Tensor | None) -> None:
        """Add what a chunk of labels gives: from `rows`, or for G = 1 from g and its stored weights. Atomics have done it."""
        if self.atomic is not None:
            return
        if self.order is None:
            self._add_spread(part, g, weight)
        else:
            self._add_gathered(self.order, part, g, weight)

    def _add_spread(self, part: Layer, g: Tensor | None, weight: Tensor | None) -> None:
        plan = self._job.plan
        config, grid = plan.spread, plan.spread_grid(len(self._partial))
        if self._tiles is None:
            tiles = (math.prod(grid), config.block_l, config.block_d)
            self._tiles = torch.empty(tiles, dtype=self._job.dtype, device=self._job.x.device)
        self._launch(
            self._spread, grid,
            g, weight, part.index, self._tiles, self._partial, part.labels, plan.dx_features, plan.fan_in, plan.stride,
            K_BLOCKS=-(-plan.fan_in // config.block_k), BLOCK_L=config.block_l, BLOCK_K=config.block_k,
            BLOCK_D=config.block_d, BLOCK_B=config.block_b, **configs.options(config),
        )  # fmt: skip

    def _add_gathered(self, order: Order, part: Layer, g: Tensor | None, weight: Tensor | None) -> None:
        plan = self._job.plan
        config = configs.reduce(plan.group, plan.config.block_b)
        first = (part.first - self._job.layer.first) // plan.group // order.rows
        blocks = -(-len(part.index) // order.rows)
        run = plan.feature_run(len(self._partial))
        self._launch(
            self._reduce, (len(self._partial), -(-plan.dx_features // run), plan.stride // config.block_b),
            g if plan.group == 1 else self.rows, weight, order.places[first:], order.starts[first:], order.longest[first:],
            self._partial, blocks, order.rows * plan.fan_in, plan.dx_features, run, plan.stride,
            RUN=RUN, FAN_IN=plan.fan_in, TILES=plan.tiles_per_group,
            BLOCK_F=config.block_f, BLOCK_E=config.block_e, BLOCK_B=config.block_b,
            TURNS=config.turns, **configs.options(config),
        )  # fmt: skip

    def total(self) -> Tensor:
        """dx [B, D] in x's type."""
        total = self._partial[0] if len(self._partial) == 1 else self._partial.sum(0)
        return total[:, : len(self._job.x)].t().to(self._job.x.dtype).contiguous()
