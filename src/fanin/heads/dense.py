"""The dense rivals: a weight for each label and feature, and the same behind a low-rank projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fanin.files import InputError
from fanin.heads.head import Head
from fanin.kernels import Layer, Update
from fanin.kernels.layer import decode
from fanin.kernels.reference import logit_gradient_, tile_ranges
from fanin.objectives import Positives
from fanin.seeds import blocks, drawn_from, uniform

_BLOCK = 2**12  # labels whose random start is drawn together
ROUNDED = 512  # labels whose update is rounded at once, where weights are stored below float32


class Dense(Head):
    """One weight for each label and feature: z = W x + b.

    It never holds logits or gradients of all labels: `step` walks over chunks of labels, makes their logits, turns them into
    gradients in place, adds to dx, updates the chunk's weights and moves on.

    dtype, rounding: as `FixedFanIn` stores them; what is below float32 is computed in float32, a chunk at a time.
    """

    weight: Tensor
    compensation: Tensor | None

    def __init__(
        self,
        labels: int,
        width: int,
        loss: str = "bce",
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        rounding: str = "stochastic",
        part: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(labels, width, loss, part)
        self.rounding = rounding
        bound, size, seed = 1 / math.sqrt(width), min(_BLOCK, labels), drawn_from(generator)
        self.register_buffer("weight", torch.empty(self.labels, width, dtype=dtype))
        for number, start, stop in blocks(self.first, self.first + self.labels, size):
            offset = self.first + start - number * size
            drawn = uniform(seed, number, slice(offset, offset + stop - start), (size, width))
            self.weight[start:stop].copy_(drawn.mul_(2 * bound).sub_(bound))
        self.prepare_training(0.0)

    def prepare_training(self, momentum: float) -> None:
        super().prepare_training(momentum)
        kahan = self.rounding == "kahan" and self.weight.itemsize < 4
        self.register_buffer("compensation", torch.zeros_like(self.weight, dtype=torch.bfloat16) if kahan else None)

    def _momenta(self) -> list[tuple[str, Tensor, torch.dtype]]:
        dtype = self.weight.dtype if self.weight.itemsize >= 4 else torch.bfloat16
        return [("momentum", self.weight, dtype), ("bias_momentum", self.bias, self.bias.dtype)]

    def chunk(self, batch: int) -> int:
        """Labels worked on at once: about 1 MiB of logits on a CPU (it stays in the cache), 64 MiB on a GPU."""
        budget = 2**18 if self.device.type == "cpu" else 2**24
        return min(max(budget // max(batch, 1), 256), 2**16)

    def _step(self, x: Tensor, positives: Positives, update: Update, want_loss: bool) -> tuple[Tensor, Tensor | None]:
        xt = x.t().contiguous()
        dxt = torch.zeros_like(xt)
        chunk = self.chunk(len(x))
        ranges = tile_ranges(positives.labels, self.labels, chunk).tolist()
        losses = []
        for i, start in enumerate(range(0, self.labels, chunk)):
            rows, own = slice(start, min(start + chunk, self.labels)), slice(ranges[i], ranges[i + 1])
            weight = _computable(self.weight[rows])
            g = torch.addmm(self.bias[rows, None], weight, xt)
            losses.append(logit_gradient_(g, positives.labels[own] - start, positives.documents[own], self.loss, want_loss))
            dxt.addmm_(weight.t(), g)
            if self.weight.itemsize >= 4:
                _add_outer(weight, _part(self.momentum, rows), g, x, update)
            else:
                self._add_rounded(rows, g @ x, update)
            update.apply(self.bias[rows], g.sum(1), _part(self.bias_momentum, rows), decay=False)
            del g  # before the next chunk's is made
        total = torch.stack([value.double() for value in losses if value is not None]).sum() if want_loss else None
        return dxt.t().contiguous(), total

    def _add_rounded(self, rows: slice, gradient: Tensor, update: Update) -> None:
        """SGD on weights [l, D'] below float32; `gradient` is overwritten."""
        layer = Layer(
            weight=self.weight[rows],
            index=gradient.new_empty(0, dtype=torch.uint16),
            momentum=_part(self.momentum, rows),
            compensation=_part(self.compensation, rows),
            first=self.first + rows.start,
        )
        for own, part in zip(gradient.split(ROUNDED), layer.parts(ROUNDED), strict=True):
            update.apply_rounded(part, own)

    @torch.no_grad()
    def logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        return self._part_logits(self._read(x), start, stop)

    def _read(self, x: Tensor) -> Tensor:
        """What `weight` is multiplied with."""
        return x

    def _part_logits(self, y: Tensor, start: int, stop: int) -> Tensor:
        return torch.addmm(self.bias[start:stop], y, _computable(self.weight[start:stop]).t())

    def _topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        y, scores = self._read(x), x.new_empty(len(x), 0)
        rows = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        size = max(self.chunk(len(x)), 4 * k)
        for start in range(0, self.labels, size):
            z = self._part_logits(y, start, min(start + size, self.labels))
            top, where = z.topk(min(k, z.shape[1]), dim=1)
            scores, rows = torch.cat([scores, top], 1), torch.cat([rows, where + start], 1)
            scores, keep = scores.topk(min(k, scores.shape[1]), dim=1)
            rows = rows.gather(1, keep)
        return scores, rows


class Bottleneck(Dense):
    """A dense head of rank R: z = W (P x) + b, the dense rival of the same memory as a sparse one."""

    projection: Tensor
    projection_momentum: Tensor | None

    def __init__(self, labels: int, width: int, rank: int, loss: str = "bce", generator: torch.Generator | None = None) -> None:
        if rank > width:
            raise InputError(f"head.bottleneck: {rank} is above the {width} features it reads; lower it")
        bound = 1 / math.sqrt(width)
        projection = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        super().__init__(labels, rank, loss, generator)
        self.width = self.inner = self.learnt = width  # of x; what its labels read is the projection's
        self.register_buffer("projection", projection)
        self.prepare_training(0.0)

    def _momenta(self) -> list[tuple[str, Tensor, torch.dtype]]:
        own = super()._momenta()
        if "projection" not in self._buffers:
            return own
        return [*own, ("projection_momentum", self.projection, self.projection.dtype)]

    def _step(self, x: Tensor, positives: Positives, update: Update, want_loss: bool) -> tuple[Tensor, Tensor | None]:
        """The projection is updated after all labels gave their part of its gradient."""
        dy, loss = super()._step(self._read(x), positives, update, want_loss)
        dx = dy @ self.projection
        update.apply(self.projection, dy.t() @ x, self.projection_momentum)
        return dx, loss

    def _read(self, x: Tensor) -> Tensor:
        return x @ self.projection.t()


def _add_outer(weight: Tensor, momentum: Tensor | None, g: Tensor, x: Tensor, update: Update) -> None:
    """SGD on `weight` [l, D'] with the gradient g x, which goes straight into weight or momentum and is never held."""
    if momentum is None:
        weight.mul_(1 - update.lr * update.weight_decay).addmm_(g, x, alpha=-update.lr * update.scale)
        return
    momentum.addmm_(g, x, beta=update.momentum, alpha=update.scale)
    if update.weight_decay:
        momentum.add_(weight, alpha=update.weight_decay)
    weight.add_(momentum, alpha=-update.lr)


def _computable(weight: Tensor) -> Tensor:
    """The weights themselves, or a copy in float32 of those that are stored in less."""
    return weight if weight.itemsize >= 4 else decode(weight)


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
