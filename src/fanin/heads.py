"""The output layer with its own update rule. All heads share one protocol, so the trainer knows none of them by name.

A head never holds logits or gradients for all labels: `step` walks over chunks of labels, makes their logits, turns them
into gradients in place, adds to dx, updates the chunk's weights and moves on. State lives in buffers; autograd sees none of it.
The rows of a head are labels in the head's own order (see `model.Classifier.order`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fanin import kernels, rewiring
from fanin.files import InputError
from fanin.objectives import LOSSES, Positives, logit_gradient_

_TRAINING_BUFFERS = ("momentum", "bias_momentum", "projection_momentum")


def index_dtype(width: int) -> torch.dtype:
    """The smallest integer type that holds feature numbers 0..width-1."""
    for limit, dtype in ((2**8, torch.uint8), (2**15, torch.int16), (2**16, torch.uint16)):
        if width <= limit:
            return dtype
    return torch.int32


@dataclass(frozen=True, kw_only=True)
class Update:
    """One SGD update: lr, momentum, weight decay, and a factor on the gradient (1 / accumulation)."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    scale: float = 1.0

    def apply(self, weight: Tensor, gradient: Tensor, momentum: Tensor | None, decay: bool = True) -> None:
        """Update `weight` in place as torch.optim.SGD does; `gradient` is overwritten."""
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        if decay and self.weight_decay:
            gradient.add_(weight, alpha=self.weight_decay)
        if momentum is not None:
            gradient = momentum.mul_(self.momentum).add_(gradient)
        weight.add_(gradient, alpha=-self.lr)


class Head(nn.Module):
    """What every head has. Subclasses give `_logits` and `_backward` for a chunk of labels.

    labels: L; width: D', the features it reads; loss: bce or squared_hinge.
    """

    bias: Tensor
    momentum: Tensor | None
    bias_momentum: Tensor | None

    def __init__(self, labels: int, width: int, loss: str = "bce") -> None:
        super().__init__()
        if loss not in LOSSES:
            raise InputError(f"head.loss: {loss!r} is not one of {', '.join(LOSSES)}")
        self.labels, self.width, self.loss = labels, width, loss
        # a label that never fires: the logit of one label a document, or the hinge's margin
        self.register_buffer("bias", torch.full((labels,), -math.log(labels + 1) if loss == "bce" else -1.0))

    # training -----------------------------------------------------------------------------------------------------

    def prepare_training(self, momentum: float) -> None:
        """Allocate the optimiser's state (none for momentum 0)."""
        for name, weight in self._momenta():
            self.register_buffer(name, torch.zeros_like(weight) if momentum else None)

    def finish_training(self) -> None:
        """Free the optimiser's state."""
        for name, _ in self._momenta():
            self.register_buffer(name, None)

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        positives: Positives,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        want_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Forward, backward and update in one pass over the labels.

        x [B, D'] float32 -> (dx [B, D'], summed loss [] or None). The loss is summed over labels and documents;
        `scale` multiplies the gradient that updates the head, not dx (1 / B makes the update that of a mean).
        dx is taken with the weights from before the update.
        """
        update = Update(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=scale)
        xt = x.detach().t().contiguous()
        dxt = torch.zeros_like(xt)
        chunk = self.chunk(len(x))
        ranges = positives.ranges(self.labels, chunk)
        losses = []
        for i, (start, stop) in enumerate(self._chunks(chunk)):
            own = slice(ranges[i], ranges[i + 1])
            z = self._logits(xt, start, stop)
            rows, columns = positives.labels[own] - start, positives.documents[own]
            losses.append(logit_gradient_(z, rows, columns, self.loss, want_loss))
            self._backward(xt, dxt, z, start, stop, update)
        self._end_step(xt, dxt, update)
        total = torch.stack([value.double() for value in losses if value is not None]).sum() if want_loss else None
        return self._input_gradient(dxt).t().contiguous(), total

    def chunk(self, batch: int) -> int:
        """Labels worked on at once: about 1 MiB of logits on a CPU (it stays in the cache), 64 MiB on a GPU."""
        budget = 2**18 if self.bias.device.type == "cpu" else 2**24
        return min(max(budget // max(batch, 1), 256), 2**16)

    def _chunks(self, chunk: int) -> Iterator[tuple[int, int]]:
        for start in range(0, self.labels, chunk):
            yield start, min(start + chunk, self.labels)

    def _logits(self, xt: Tensor, start: int, stop: int) -> Tensor:
        raise NotImplementedError

    def _backward(self, xt: Tensor, dxt: Tensor, g: Tensor, start: int, stop: int, update: Update) -> None:
        raise NotImplementedError

    def _end_step(self, xt: Tensor, dxt: Tensor, update: Update) -> None:
        """What is left to update once all labels are done."""

    def _input_gradient(self, dxt: Tensor) -> Tensor:
        return dxt

    def _momenta(self) -> list[tuple[str, Tensor]]:
        raise NotImplementedError

    def rewire(
        self, schedule: rewiring.Schedule, step: int, generator: torch.Generator, x: Tensor, positives: Positives
    ) -> dict[str, float]:
        """Prune and regrow; only a sparse head can."""
        raise InputError(f"rewiring.method: {schedule.method} needs head.kind fixed_fan_in; set rewiring.method to none")

    # inference ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [B, D'] -> logits of rows start..stop-1 [B, stop - start]."""
        return self._logits(x.t().contiguous(), start, stop).t()

    @torch.no_grad()
    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x [B, D'] -> (scores [B, k], rows [B, k] int64), highest first, exact; k at most L. Never holds all logits."""
        if not 1 <= k <= self.labels:
            raise ValueError(f"k must be 1 to {self.labels} (the number of labels), found {k}")
        xt = x.t().contiguous()
        scores = x.new_empty(len(x), 0)
        rows = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for start, stop in self._chunks(max(self.chunk(len(x)), 4 * k)):
            z = self._logits(xt, start, stop).t()
            top, where = z.topk(min(k, stop - start), dim=1)
            scores, rows = torch.cat([scores, top], 1), torch.cat([rows, where + start], 1)
            scores, keep = scores.topk(min(k, scores.shape[1]), dim=1)
            rows = rows.gather(1, keep)
        return scores, rows

    # state --------------------------------------------------------------------------------------------------------

    def bytes(self) -> dict[str, int]:
        """Bytes held: weights, indices, bias, optimizer."""
        sizes = {"weights": 0, "indices": 0, "bias": 0, "optimizer": 0}
        for name, buffer in self.named_buffers():
            own = name.rpartition(".")[2]
            kind = {"index": "indices", "bias": "bias"}.get(own, "optimizer" if own in _TRAINING_BUFFERS else "weights")
            sizes[kind] += buffer.numel() * buffer.element_size()
        return sizes

    def model_state(self) -> dict[str, Tensor]:
        """The state dict without the optimiser's part."""
        return {k: v for k, v in self.state_dict().items() if k.rpartition(".")[2] not in _TRAINING_BUFFERS}

    def load_model_state(self, state: dict[str, Tensor], source: str) -> None:
        """Load what `model_state` gave. Raises InputError naming `source` where shapes, keys or indices do not fit."""
        own = self.model_state()
        if set(state) != set(own):
            raise InputError(
                f"{source}: holds {sorted(state)}, but this head needs {sorted(own)}; rerun the stage that writes it"
            )
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise InputError(
                    f"{source}: {key} is {tuple(value.shape)}, but the settings ask for {tuple(own[key].shape)}; "
                    "rerun the stage that writes it"
                )
        self._check_state(state, source)
        self.load_state_dict(state, strict=False)

    def _check_state(self, state: dict[str, Tensor], source: str) -> None:
        for key, value in state.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise InputError(f"{source}: {key} holds NaN or infinite values; rerun the stage that writes it")


class Dense(Head):
    """One weight for each label and feature: z = W x + b."""

    weight: Tensor

    def __init__(self, labels: int, width: int, loss: str = "bce", generator: torch.Generator | None = None) -> None:
        super().__init__(labels, width, loss)
        bound = 1 / math.sqrt(width)
        self.register_buffer("weight", torch.empty(labels, width).uniform_(-bound, bound, generator=generator))
        self.prepare_training(0.0)

    def _momenta(self) -> list[tuple[str, Tensor]]:
        return [("momentum", self.weight), ("bias_momentum", self.bias)]

    def _logits(self, xt: Tensor, start: int, stop: int) -> Tensor:
        return torch.addmm(self.bias[start:stop, None], self.weight[start:stop], xt)

    def _backward(self, xt: Tensor, dxt: Tensor, g: Tensor, start: int, stop: int, update: Update) -> None:
        dxt.addmm_(self.weight[start:stop].t(), g)
        update.apply(self.weight[start:stop], g @ xt.t(), _part(self.momentum, start, stop))
        update.apply(self.bias[start:stop], g.sum(1), _part(self.bias_momentum, start, stop), decay=False)


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
        self.width = width
        self.register_buffer("projection", projection)
        self.prepare_training(0.0)

    def _momenta(self) -> list[tuple[str, Tensor]]:
        own = super()._momenta()
        return [*own, ("projection_momentum", self.projection)] if "projection" in self._buffers else own

    @torch.no_grad()
    def step(self, x: Tensor, positives: Positives, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """As Head.step; the projection is updated after all labels gave their part of its gradient."""
        dy, loss = super().step(x @ self.projection.t(), positives, **settings)
        update = Update(**{key: value for key, value in settings.items() if key != "want_loss"})
        dx = dy @ self.projection
        update.apply(self.projection, dy.t() @ x.detach(), self.projection_momentum)
        return dx, loss

    @torch.no_grad()
    def logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        return super().logits(x @ self.projection.t(), start, stop)

    @torch.no_grad()
    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return super().topk(x @ self.projection.t(), k)


class FixedFanIn(Head):
    """Every label reads K of the D' features; groups of G labels share which. Weight [L, K], index [ceil(L/G), K].

    Source: fixed fan-in output layers, Schultheis & Babbar, ECML 2023; dynamic sparsity on them, arXiv 2411.03171.
    """

    weight: Tensor
    index: Tensor

    def __init__(
        self,
        labels: int,
        width: int,
        fan_in: int,
        group: int = 1,
        loss: str = "bce",
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(labels, width, loss)
        if fan_in > width:
            raise InputError(
                f"head.fan_in: {fan_in} is above the {width} features that the head reads; lower it, or raise head.intermediate"
            )
        self.fan_in, self.group = fan_in, group
        self.kernels = kernels.backend(backend)
        bound = 1 / math.sqrt(fan_in)
        self.register_buffer("weight", torch.empty(labels, fan_in).uniform_(-bound, bound, generator=generator))
        self.register_buffer("index", torch.empty(-(-labels // group), fan_in, dtype=index_dtype(width)))
        for start, stop in self._row_chunks():
            score = torch.rand(stop - start, width, generator=generator)
            self.index[start:stop].copy_(score.topk(fan_in, dim=1).indices.sort(dim=1).values)
        self.prepare_training(0.0)

    def _momenta(self) -> list[tuple[str, Tensor]]:
        return [("momentum", self.weight), ("bias_momentum", self.bias)]

    def chunk(self, batch: int) -> int:
        return -(-super().chunk(batch) // self.group) * self.group

    def _row_chunks(self) -> Iterator[tuple[int, int]]:
        """Chunks of index rows for which a [rows * G, D'] dense gradient takes about 16 MiB."""
        rows = -(-self.labels // self.group)
        size = max(2**22 // (self.width * self.group), 1)
        for start in range(0, rows, size):
            yield start, min(start + size, rows)

    def _rows(self, start: int, stop: int) -> Tensor:
        return self.index[start // self.group : -(-stop // self.group)]

    def _logits(self, xt: Tensor, start: int, stop: int) -> Tensor:
        z = self.kernels.forward(xt, self.weight[start:stop], self._rows(start, stop), self.group)
        return z.add_(self.bias[start:stop, None])

    def _backward(self, xt: Tensor, dxt: Tensor, g: Tensor, start: int, stop: int, update: Update) -> None:
        weight, index = self.weight[start:stop], self._rows(start, stop)
        self.kernels.add_input_gradient(dxt, g, weight, index, self.group)
        update.apply(weight, self.kernels.weight_gradient(xt, g, index, self.group), _part(self.momentum, start, stop))
        update.apply(self.bias[start:stop], g.sum(1), _part(self.bias_momentum, start, stop), decay=False)

    @torch.no_grad()
    def rewire(
        self, schedule: rewiring.Schedule, step: int, generator: torch.Generator, x: Tensor, positives: Positives
    ) -> dict[str, float]:
        """Prune and regrow in place, chunk by chunk; regrown weights and their momenta start at zero.

        x [B, D'] and its positives give RigL's dense gradient (in chunks, only now).
        Returns entries, pruned, and moved (those that read another feature now).
        """
        amount = schedule.amount_at(step)
        if schedule.prune == "global":
            amount = rewiring.global_threshold(self._magnitudes, self.index.numel(), amount)
        pruned = moved = 0
        ranges = _Ranges(positives)
        for start, stop in self._row_chunks():
            weight = self._labels_of(self.weight, start, stop)
            old = self.index[start:stop].to(torch.int64)
            mask = rewiring.pruned_mask(rewiring.magnitude(weight, self.group), schedule.prune, amount)
            if schedule.method == "rigl":
                score = self._dense_gradient(x, ranges, start, stop)
            else:
                score = torch.rand(stop - start, self.width, generator=generator, device=weight.device)
            new = rewiring.regrow(old, mask, score)
            pruned += int(mask.sum())
            moved += int((new != old).sum())
            new, place = new.sort(dim=1)
            keep = (~mask).to(weight.dtype).gather(1, place)
            self.index[start:stop].copy_(new)
            place, keep = (t.repeat_interleave(self.group, 0)[: len(weight)] for t in (place, keep))
            for tensor in (self.weight, self.momentum):
                if tensor is not None:
                    part = self._labels_of(tensor, start, stop)
                    part.copy_(part.gather(1, place) * keep)
        return {"entries": self.index.numel(), "pruned": pruned, "moved": moved}

    def _magnitudes(self) -> Iterator[Tensor]:
        for start, stop in self._row_chunks():
            yield rewiring.magnitude(self._labels_of(self.weight, start, stop), self.group)

    def _labels_of(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start * self.group : min(stop * self.group, self.labels)]

    def _dense_gradient(self, x: Tensor, ranges: _Ranges, start: int, stop: int) -> Tensor:
        """|dL/dW| as if rows start..stop-1 were dense [stop - start, D']; for a group the norm over its labels."""
        first, last = start * self.group, min(stop * self.group, self.labels)
        z = self._logits(x.detach().t().contiguous(), first, last)
        rows, columns = ranges.between(first, last)
        logit_gradient_(z, rows, columns, self.loss, False)
        return rewiring.magnitude(z @ x.detach(), self.group)

    def feature_use(self) -> Tensor:
        """How many index entries, each counted for all labels of its row, read each feature: int64 [D']."""
        use = torch.zeros(self.width, dtype=torch.int64, device=self.index.device)
        for start, stop in self._row_chunks():
            rows = self.index[start:stop].to(torch.int64)
            members = torch.full((len(rows), 1), self.group, dtype=torch.int64, device=rows.device)
            if stop * self.group > self.labels:
                members[-1] = self.labels - (stop - 1) * self.group
            use.index_add_(0, rows.reshape(-1), members.expand_as(rows).reshape(-1))
        return use

    def _check_state(self, state: dict[str, Tensor], source: str) -> None:
        super()._check_state(state, source)
        for start, stop in self._row_chunks():
            rows = state["index"][start:stop].to(torch.int64).sort(dim=1).values
            if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.width):
                raise InputError(f"{source}: an index is outside 0..{self.width - 1}; rerun the stage that writes it")
            if (rows[:, 1:] == rows[:, :-1]).any():
                raise InputError(f"{source}: an index is repeated in a row; rerun the stage that writes it")


class _Ranges:
    """The positives of a run of labels, found by bisection."""

    def __init__(self, positives: Positives) -> None:
        self.positives = positives

    def between(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        bounds = torch.tensor([first, last], device=self.positives.labels.device)
        low, high = torch.searchsorted(self.positives.labels, bounds).tolist()
        return self.positives.labels[low:high] - first, self.positives.documents[low:high]


def _part(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if tensor is None else tensor[start:stop]


def build_head(settings: Any, labels: int, width: int, generator: torch.Generator | None = None) -> Head:
    """The head that `config.Head` describes, with a random start. Raises InputError where it cannot be built."""
    if settings.kind == "dense":
        return Dense(labels, width, settings.loss, generator)
    if settings.kind == "bottleneck":
        return Bottleneck(labels, width, settings.bottleneck, settings.loss, generator)
    return FixedFanIn(labels, width, settings.fan_in, settings.group, settings.loss, generator)
