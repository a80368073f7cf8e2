"""A split by frequency: dense rows for the few frequent labels, a fixed fan-in for all others."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fanin import rewiring
from fanin.files import InputError
from fanin.heads.dense import Dense
from fanin.heads.fixed_fan_in import FixedFanIn
from fanin.heads.head import Head, resting_logit
from fanin.kernels import Update
from fanin.objectives import Positives
from fanin.ranks import ALONE, Ranks


class HeadTail(Head):
    """Rows 0..H-1, the frequent labels, read every feature of the encoder's (`frequent`), the others K each (`tail`).

    dense_labels: H; the other arguments are those of `FixedFanIn` and of `Dense`. Words are read by the tail alone.
    A dense row learns at K / D' of the head's rate: one document then moves a frequent label's logit about as far as any
    other's, where the features are as large as each other, which those of a start from data are.
    """

    def __init__(
        self,
        labels: int,
        width: int,
        dense_labels: int,
        fan_in: int,
        loss: str = "bce",
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        rounding: str = "stochastic",
        **sparse: Any,
    ) -> None:
        super().__init__(labels, width, loss, bias=False)
        if not 0 < dense_labels < labels:
            raise InputError(f"head.dense_share: {dense_labels} of {labels} labels leave no head or no tail; change it")
        stored: dict[str, Any] = {"dtype": dtype, "rounding": rounding}
        self.tail = FixedFanIn(labels - dense_labels, width, fan_in, 1, loss, generator, **stored, **sparse)
        self.inner, self.learnt = self.tail.inner, self.tail.learnt
        self.frequent = Dense(dense_labels, self.inner, loss, generator, **stored)
        for _, part in self.parts():
            part.bias.fill_(resting_logit(labels, loss))

    def parts(self) -> list[tuple[int, Head]]:
        return [(0, self.frequent), (self.frequent.labels, self.tail)]

    def prepare_training(self, momentum: float) -> None:
        for _, part in self.parts():
            part.prepare_training(momentum)

    def finish_training(self) -> None:
        for _, part in self.parts():
            part.finish_training()

    def _momenta(self) -> list[tuple[str, Tensor, torch.dtype]]:
        return []  # its parts have their own

    def _step(self, x: Tensor, positives: Positives, update: Update, want_loss: bool) -> tuple[Tensor, Tensor | None]:
        cut, slower = self.frequent.labels, update.lr * self.tail.inner_fan_in / self.inner
        dx, loss = self.tail._step(x, positives.between(cut, self.labels), update, want_loss)
        own, update = positives.between(0, cut), dataclasses.replace(update, lr=slower)
        inner, more = self.frequent._step(x[:, : self.inner].contiguous(), own, update, want_loss)
        dx[:, : self.inner] += inner
        return dx, loss + more if loss is not None and more is not None else None

    def rewire(
        self, schedule: rewiring.Schedule, step: int, seed: int, x: Tensor, positives: Positives, ranks: Ranks = ALONE
    ) -> dict[str, float]:
        """`FixedFanIn.rewire` of the tail."""
        return self.tail.rewire(schedule, step, seed, x, positives.between(self.frequent.labels, self.labels), ranks)

    @torch.no_grad()
    def logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        found = []
        for first, part in self.parts():
            begin, end = max(start - first, 0), min(stop - first, part.labels)
            if begin < end:
                found.append(part.logits(x[:, : part.width], begin, end))
        return torch.cat(found, 1)

    def _topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = [(first, part._topk(x[:, : part.width].contiguous(), min(k, part.labels))) for first, part in self.parts()]
        scores, best = torch.cat([own for _, (own, _) in found], 1).topk(k, dim=1)
        return scores, torch.cat([rows + first for first, (_, rows) in found], 1).gather(1, best)

    def place(self, name: str) -> tuple[int, int]:
        part, _, own = name.partition(".")
        return {"frequent": self.frequent, "tail": self.tail}[part].place(own)

    def _check_state(self, state: dict[str, Tensor], source: str) -> None:
        for name, part in (("frequent.", self.frequent), ("tail.", self.tail)):
            part._check_state({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}, source)
