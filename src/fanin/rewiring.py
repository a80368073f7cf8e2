"""Dynamic sparse training: prune the smallest weights of a fixed fan-in layer and regrow as many elsewhere.

Pure functions on chunks of (weight [l, K], index [ceil(l/G), K]). A group of G labels shares an index row; its weights
are pruned together by the group's norm. Every row keeps K distinct indices, sorted ascending.

SET (Mocanu et al., Nature Communications 2018) regrows at random; RigL (Evci et al., ICML 2020) where the dense
gradient is largest. Regrown weights start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fanin.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When to rewire, and how much: at every `interval`-th step before `end_step`."""

    method: str  # none | set | rigl
    prune: str  # fraction | global | threshold
    amount: float
    interval: int
    end_step: int

    def due(self, step: int) -> bool:
        """Whether to rewire after optimiser step `step` (counted from 1)."""
        return self.method != "none" and step % self.interval == 0 and step < self.end_step

    def amount_at(self, step: int) -> float:
        """The fraction or threshold at `step`: it falls on a cosine from `amount` to 0 at `end_step`."""
        return self.amount * 0.5 * (1 + math.cos(math.pi * min(step, self.end_step) / max(self.end_step, 1)))


def magnitude(weight: Tensor, group: int) -> Tensor:
    """|w| [l, K], or for G > 1 the root mean square over each group's labels [ceil(l/G), K]."""
    if group == 1:
        return weight.abs()
    labels = len(weight)
    squares = F.pad(weight.square(), (0, 0, 0, -labels % group)).view(-1, group, weight.shape[1]).sum(1)
    members = torch.full((len(squares), 1), float(group), device=weight.device, dtype=weight.dtype)
    members[-1] = labels - group * (len(squares) - 1)
    return (squares / members).sqrt_()


def global_threshold(magnitudes: Callable[[], Iterable[Tensor]], entries: int, fraction: float, ranks: Ranks = ALONE) -> float:
    """The magnitude up to which `fraction` of all ranks' entries lie, from chunks, in two passes of a histogram.

    magnitudes() yields tensors of any shape with this rank's `entries`; memory stays at one chunk and 65,536 bins. Exact to
    one part in 65,536 of the range. Of equal magnitudes (there are 127 in float8) all or none, whichever comes nearer.
    """
    highest = ranks.most([max((float(chunk.max()) for chunk in magnitudes()), default=0.0)])[0]
    if highest <= 0:
        return 0.0
    bins = 65536
    counts = torch.zeros(bins, dtype=torch.float64)
    for chunk in magnitudes():
        counts += torch.histc(chunk.float(), bins, 0.0, highest).cpu().double()
    ranks.sum_([counts])
    total = ranks.total([entries])[0]
    below, wanted = counts.cumsum(0), torch.tensor(fraction * total, dtype=torch.float64)
    place = min(int(torch.searchsorted(below, wanted)), bins - 1)
    place += bool(below[place] - wanted < wanted - (below[place - 1] if place else 0))
    if place == bins:
        return highest
    edge = torch.tensor(highest * place / bins, dtype=torch.float32)  # what lies on it is of the bin above
    return float(torch.nextafter(edge, torch.zeros_like(edge)))


def pruned_mask(size: Tensor, prune: str, amount: float) -> Tensor:
    """Which entries to prune, bool like `size` [r, K].

    fraction: the floor(amount * K) smallest of each row; threshold: those below `amount`; global: those up to `amount`,
    which is then what `global_threshold` gave. A row always keeps at least one entry.
    """
    rows, fan_in = size.shape
    if prune == "fraction":
        count = min(int(amount * fan_in + 1e-9), fan_in - 1)
        mask = torch.zeros(rows, fan_in, dtype=torch.bool, device=size.device)
        if count:
            mask.scatter_(1, size.topk(count, dim=1, largest=False).indices, True)
        return mask
    mask = size <= amount if prune == "global" else size < amount
    full = mask.all(dim=1)
    mask[full, size[full].argmax(dim=1)] = False
    return mask


def regrow(index: Tensor, mask: Tensor, score: Tensor) -> Tensor:
    """New int64 indices [r, K]: where `mask` the free features with the highest `score`, elsewhere the old ones.

    score [r, D] floats (random for SET, the dense gradient's magnitude for RigL); it is overwritten. A pruned feature may
    come back only where too few free ones are left, so rows stay distinct whatever K and D.
    """
    index = index.to(torch.int64)
    most = int(mask.sum(dim=1).max()) if mask.numel() else 0
    if most == 0:
        return index.clone()
    score.clamp_(min=0)
    score.scatter_(1, index, torch.where(mask, -1.0, -2.0).to(score.dtype))  # kept: never; pruned: the last resort
    best = score.topk(most, dim=1).indices
    rank = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    return torch.where(mask, best.gather(1, rank), index)


def regrow_from(index: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
    """New int64 indices [r, K]: where `mask` the row's next candidate, elsewhere the old ones.

    candidates [r, n]: free features of each row, the best first, -1 where there are no more (the pruned feature then stays,
    so that rows remain distinct); n is at least the most that a row loses.
    """
    index = index.to(torch.int64)
    rank = (mask.cumsum(dim=1) - 1).clamp_(0, candidates.shape[1] - 1)
    chosen = candidates.to(torch.int64).gather(1, rank)
    return torch.where(mask & (chosen >= 0), chosen, index)


def move_(index: Tensor, new: Tensor, mask: Tensor, tensors: Iterable[Tensor], group: int = 1) -> int:
    """Write the indices `new` [r, K] to the rows `index` [r, K], sorted, and let what belongs to them follow, in place.

    tensors [l, K]: weights, momenta, gradients of the rows' labels, r = ceil(l / group); each entry goes where its feature
    went, or becomes zero where `mask` [r, K]. Returns how many entries read another feature now.
    """
    moved = int((new != index.to(torch.int64)).sum())
    new, place = new.sort(dim=1)
    index.copy_(new)
    gone = mask.gather(1, place)
    if group > 1:
        place, gone = place.repeat_interleave(group, 0), gone.repeat_interleave(group, 0)
    for tensor in tensors:
        bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # fp8 has no gather
        bits.copy_(bits.gather(1, place[: len(bits)]).masked_fill_(gone[: len(bits)], 0))
    return moved


def check_index(index: Tensor, width: int) -> None:
    """Raise ValueError, naming the first bad row, unless the rows of `index` [r, K] hold distinct numbers in 0..width-1."""
    size = max(2**22 // max(index.shape[1], 1), 1)
    for start in range(0, len(index), size):
        rows = index[start : start + size].to(torch.int64).sort(dim=1).values
        outside = (rows < 0) | (rows >= width)
        if outside.any():
            row, place = outside.nonzero()[0].tolist()
            raise ValueError(f"index row {start + row} holds {int(rows[row, place])}, outside 0..{width - 1} (the features)")
        repeated = rows[:, 1:] == rows[:, :-1]
        if repeated.any():
            row, place = repeated.nonzero()[0].tolist()
            raise ValueError(f"index row {start + row} holds {int(rows[row, place])} twice; a row's features must be distinct")
