"""How a call is cut up, worked out from shapes alone: no tensor, no GPU, no Triton."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from fanin.kernels.triton import configs

SORTED_AT_ONCE = 2**21
"""Index entries sorted by feature at once."""
SORTING_BYTES = 48
"""What that takes for each of them."""
RUN = 16
"""Features whose longest list is kept with an order."""
_SMALL = 2**16  # places that a uint16 can number
_LABELS = 1024  # of a G = 1 block: 64 documents of its rows of g, and its weights, stay in an SM's L1 cache
_GATHERED_PER_FEATURE, _ADDED_PER_FEATURE = 16, 4  # G = 1, G > 1: shorter lists would leave a program's lanes idle
_SPREAD = 64  # features a weight, at most, with which dx of G = 1 is a product of tiles of mostly zeros
_SPREAD_PROGRAMS = 528  # four a multiprocessor of the largest GPUs
_MULTIPLE = 64  # of index rows a block: whole tiles
_SLICES, _GROUPED_SLICES = 256, 16  # partial sums of dx, at most
_PROGRAMS, _GROUPED_PROGRAMS = 1024, 4096  # that keep a GPU busy


@dataclass(frozen=True)
class Plan:
    """A layer's shape, x's, whether the arithmetic is float32 (`wide`) or bfloat16, and the GPU's compute capability.

    learnt: features from this number on have no dx.
    """

    labels: int
    features: int
    fan_in: int
    group: int
    batch: int
    wide: bool = True
    capability: int = 90
    learnt: int | None = None

    @functools.cached_property  # launches ask for it again and again
    def config(self) -> configs.Single | configs.Grouped:
        if self.group == 1:
            return configs.single(self.fan_in, self.batch)
        return configs.grouped(self.fan_in, self.group, self.batch, self.wide, self.capability)

    @functools.cached_property
    def tile(self) -> int:
        """Labels a program works on, at most."""
        return self.config.block_l if isinstance(self.config, configs.Single) else self.config.block_m

    @functools.cached_property
    def itemsize(self) -> int:
        return 4 if self.wide else 2

    @functools.cached_property
    def dx_features(self) -> int:
        """Features that dx is summed of."""
        return self.features if self.learnt is None else min(self.learnt, self.features)

    @functools.cached_property
    def spreads(self) -> bool:
        """Whether dx is summed by spread.py, without an order."""
        return self.group == 1 and self.dx_features <= _SPREAD * self.fan_in

    @functools.cached_property
    def spread(self) -> configs.Spread:
        return configs.spread(self.fan_in, self.stride, self.wide, self.capability)

    def spread_grid(self, slices: int) -> tuple[int, int, int]:
        """Programs of spread.py: slices of labels, runs of features, blocks of documents."""
        return slices, -(-self.dx_features // self.spread.block_d), self.stride // self.spread.block_b

    @functools.cached_property
    def columns(self) -> int:
        """Blocks of documents."""
        return -(-self.batch // self.config.block_b)

    @functools.cached_property
    def stride(self) -> int:
        """Documents in whole blocks: a row of xt, g and dx."""
        return self.columns * self.config.block_b

    @functools.cached_property
    def fused(self) -> bool:
        """Whether one kernel makes a whole step: it then has a tile's whole fan-in and all documents at once."""
        return self.group == 1 or (self.fan_in <= self.config.block_k and self.columns == 1)

    @functools.cached_property
    def backward_k(self) -> int:
        """block_k where dL/dlogits are given: sums over all documents are held beside those of one block."""
        return min(self.config.block_k, 64)

    @functools.cached_property
    def tiles_per_group(self) -> int:
        return 1 if self.group == 1 else -(-self.group // self.tile)

    def tiles(self, labels: int) -> int:
        """Tiles of the first `labels` labels: whole groups, but for the layer's last."""
        if self.group == 1:
            return -(-labels // self.tile)
        return -(-labels // self.group) * self.tiles_per_group

    def block_rows(self) -> int:
        """Index rows whose entries are sorted by feature together: 2^16 entries or fewer, but where there are many features
        enough for 16 (G > 1: 4) each. Where nothing is sorted, a tile's."""
        if self.spreads:
            return _MULTIPLE
        rows = _SMALL // self.fan_in
        if self.group == 1:
            rows = min(rows, _LABELS)
        entries = (_GATHERED_PER_FEATURE if self.group == 1 else _ADDED_PER_FEATURE) * self.dx_features
        rows = max(rows, -(-entries // self.fan_in))
        return max(rows // _MULTIPLE, 1) * _MULTIPLE

    def chunk(self, budget: int, blocks: bool) -> int:
        """Labels worked on at once: what `budget` bytes hold of what one launch leaves to the next, in whole tiles, and with
        `blocks` in whole blocks of index rows."""
        row = self.stride * self.itemsize
        unit = self.block_rows() if blocks else _MULTIPLE
        if self.group == 1:
            rows = budget // (row + self.fan_in * 4)
        else:
            rows = budget // (row * (self.fan_in * self.tiles_per_group + (0 if self.fused else self.group)))
        return max(rows // unit, 1) * unit * self.group

    def slices(self, chunk: int) -> int:
        """Partial sums of dx that are kept apart, so that as many programs can work on it."""
        if self.spreads:
            programs = math.prod(self.spread_grid(1))
            return max(min(_SPREAD_PROGRAMS // programs, -(-min(chunk, self.labels) // self.spread.block_l)), 1)
        blocks = -(-min(chunk, self.labels) // self.group // self.block_rows())
        most = min(
            _SLICES if self.group == 1 else _GROUPED_SLICES, configs.PARTIAL_BYTES // (4 * self.dx_features * self.stride)
        )
        return max(min(blocks, most), 1)

    def feature_run(self, slices: int) -> int:
        """Features that a program of the sum works through."""
        config = configs.reduce(self.group, self.config.block_b)
        wanted = _PROGRAMS if self.group == 1 else _GROUPED_PROGRAMS
        programs = max(wanted // (slices * (self.stride // config.block_b)), 1)
        run = -(-self.dx_features // programs)
        return -(-run // RUN) * RUN if run > config.block_f else config.block_f

    def topk_repeat(self) -> int:
        """G > 1: tiles of labels whose maximum is one number."""
        return self.tiles_per_group if self.tiles_per_group > 1 else max(configs.TOPK_TILE // self.group, 1)

    def topk_tile(self) -> int:
        """Labels whose maximum is one number."""
        return configs.TOPK_TILE if self.group == 1 else self.group * self.topk_repeat() // self.tiles_per_group

    def order_bytes(self) -> int:
        """Of the sorted places of all index entries (order.py)."""
        if self.spreads:
            return 0
        rows = -(-self.labels // self.group)
        block = min(self.block_rows(), rows)
        blocks = -(-rows // block)
        return blocks * (
            block * self.fan_in * (2 if block * self.fan_in <= _SMALL else 4)
            + 4 * (self.dx_features + 1 + -(-self.dx_features // RUN))
        )

    def step_bytes(self, budget: int = configs.SCRATCH_BYTES) -> int:
        """What a deterministic step allocates at its highest: the places, and either what sorting them takes, or x, a
        chunk's scratch, the positives' ranges and dx."""
        chunk = min(self.chunk(budget, True), self.labels)
        row = self.stride * self.itemsize
        if self.group == 1:
            scratch = chunk * (row + 4 * self.fan_in)
        else:
            groups = -(-chunk // self.group)
            scratch = groups * self.tiles_per_group * self.fan_in * row + (0 if self.fused else chunk * row)
        dx = 4 * self.dx_features * self.stride
        own = self.features * row + scratch + 24 * (self.tiles(self.labels) + 1) + (self.slices(chunk) + 2) * dx
        if self.spreads:
            tiles = math.prod(self.spread_grid(self.slices(chunk)))
            return own + tiles * self.spread.block_l * self.spread.block_d * self.itemsize
        entries = min(SORTED_AT_ONCE, -(-self.labels // self.group) * self.fan_in)
        return self.order_bytes() + max(own, SORTING_BYTES * entries)


def step_bytes(*, labels: int, features: int, fan_in: int, group: int, batch: int, learnt: int | None = None) -> int:
    """Backend.step_bytes of the `triton` backend, also where there is no GPU; with float32 arithmetic, which takes most."""
    return Plan(labels, features, fan_in, group, batch, learnt=learnt).step_bytes()
