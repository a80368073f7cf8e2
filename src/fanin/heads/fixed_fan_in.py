"""The head that this project is about: every label reads K features, groups of G labels share which."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fanin import kernels, rewiring
from fanin.files import InputError
from fanin.heads.head import Head
from fanin.kernels import Backend, Layer, Update
from fanin.kernels.layer import FAN_IN_LIMIT, WEIGHT_TYPES, decode, index_dtype
from fanin.objectives import Positives
from fanin.ranks import ALONE, Ranks
from fanin.seeds import blocks, drawn_from, seed_of, uniform


class _Rows(NamedTuple):
    """A chunk of own index rows: start..stop-1, which are `within` the whole head's block of that number."""

    start: int
    stop: int
    block: int
    within: slice


class FixedFanIn(Head):
    """z[b, l] = bias[l] + sum_k weight[l, k] x[b, index[l // G, k]]. Weight [L, K], index [ceil(L/G), K].

    dtype: what the weights are stored in. Below float32 momentum is kept in bfloat16, and sums are rounded stochastically, or
    (rounding "kahan") to nearest with the loss carried in a bfloat16 compensation [L, K].
    backend: the kernels, as in `kernels.backend`.
    lexical: how many of the K entries, the last ones of each row, read the last `vocabulary` of the features, words and before
    them `profiles` sums of words; they are chosen by the start, and rewiring leaves them where they are.
    drawn: whether rows are drawn at random, which takes seconds; else they are zero, for a state that is to be loaded.
    Source: fixed fan-in output layers, Schultheis & Babbar, ECML 2023; dynamic sparsity on them, arXiv 2411.03171.
    """

    weight: Tensor
    index: Tensor
    compensation: Tensor | None

    def __init__(
        self,
        labels: int,
        width: int,
        fan_in: int,
        group: int = 1,
        loss: str = "bce",
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        rounding: str = "stochastic",
        backend: str = "auto",
        part: tuple[int, int] | None = None,
        lexical: int = 0,
        vocabulary: int = 0,
        profiles: int = 0,
        drawn: bool = True,
    ) -> None:
        super().__init__(labels, width, loss, part)
        if self.first % group:
            raise ValueError(f"part must begin with a whole group of {group} labels, found {self.first}")
        self.inner, self.inner_fan_in = width - vocabulary, fan_in - lexical
        self.learnt = self.inner + profiles
        if self.inner_fan_in > self.inner:
            raise InputError(
                f"head.fan_in: {self.inner_fan_in} is above the {self.inner} features that the head reads; lower it, or raise "
                "head.intermediate"
            )
        if lexical > vocabulary:
            raise InputError(f"head.lexical: {lexical} is above the {vocabulary} tokens of the encoder; lower it")
        if fan_in > FAN_IN_LIMIT:
            raise InputError(f"head.fan_in: {fan_in} is above {FAN_IN_LIMIT}, the most that the kernels take; lower it")
        if dtype not in WEIGHT_TYPES:
            raise InputError(f"head.dtype: {dtype} is not one of {', '.join(map(str, WEIGHT_TYPES))}")
        self.fan_in, self.group, self.rounding, self.backend = fan_in, group, rounding, backend
        kernels.backend(backend)  # a name that cannot run is an error now
        bound, size, seed = 1 / math.sqrt(fan_in), self._block, drawn_from(generator)
        self.register_buffer("weight", torch.zeros(self.labels, fan_in, dtype=dtype))
        self.register_buffer("index", torch.zeros(-(-self.labels // group), fan_in, dtype=index_dtype(width)))
        for rows in self._row_chunks() if drawn else ():
            score = uniform(seed, 2 * rows.block, rows.within, (size, self.inner))
            found = score.topk(self.inner_fan_in, dim=1).indices.sort(dim=1).values
            words = torch.arange(self.learnt, self.learnt + lexical, device=found.device).expand(len(found), -1)
            self.index[rows.start : rows.stop].copy_(torch.cat([found, words], 1))
            own = self._labels_of(self.weight, rows.start, rows.stop)
            members = slice(rows.within.start * group, rows.within.start * group + len(own))
            values = uniform(seed, 2 * rows.block + 1, members, (size * group, fan_in))
            own.copy_(values.mul_(2 * bound).sub_(bound))
            if lexical:
                own[:, self.inner_fan_in :] = torch.zeros(len(own), lexical).to(dtype)
        self.prepare_training(0.0)

    def prepare_training(self, momentum: float) -> None:
        super().prepare_training(momentum)
        kahan = self.rounding == "kahan" and self.weight.itemsize < 4
        self.register_buffer("compensation", torch.zeros_like(self.weight, dtype=torch.bfloat16) if kahan else None)

    def _momenta(self) -> list[tuple[str, Tensor, torch.dtype]]:
        dtype = self.weight.dtype if self.weight.itemsize >= 4 else torch.bfloat16
        return [("momentum", self.weight, dtype), ("bias_momentum", self.bias, self.bias.dtype)]

    def layer(self) -> Layer:
        """The tensors as the kernels take them."""
        return Layer(
            weight=self.weight,
            index=self.index,
            bias=self.bias,
            group=self.group,
            momentum=self.momentum,
            bias_momentum=self.bias_momentum,
            compensation=self.compensation,
            first=self.first,
            learnt=self.learnt,
        )

    def _kernels(self) -> Backend:
        return kernels.backend(self.backend, self.weight.device, self.weight.dtype)

    @property
    def _block(self) -> int:
        """Index rows for which a [rows * G, D'] dense gradient of the encoder's features takes about 16 MiB."""
        return min(max(2**22 // (self.inner * self.group), 1), -(-self.whole // self.group))

    def _row_chunks(self) -> Iterator[_Rows]:
        """Own index rows, a block of the whole head or its part at a time."""
        first, size = self.first // self.group, self._block
        for number, start, stop in blocks(first, first + -(-self.labels // self.group), size):
            offset = first + start - number * size
            yield _Rows(start, stop, number, slice(offset, offset + stop - start))

    def _step(self, x: Tensor, positives: Positives, update: Update, want_loss: bool) -> tuple[Tensor, Tensor | None]:
        return self._kernels().step(x, self.layer(), positives.labels, positives.documents, update, self.loss, want_loss)

    @torch.no_grad()
    def logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        first = start // self.group * self.group  # parts are whole groups
        return self._kernels().logits(x, self.layer().part(first, stop))[:, start - first :]

    def _topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self._kernels().topk(x, self.layer(), k)

    @torch.no_grad()
    def rewire(
        self, schedule: rewiring.Schedule, step: int, seed: int, x: Tensor, positives: Positives, ranks: Ranks = ALONE
    ) -> dict[str, float]:
        """Prune and regrow in place, chunk by chunk; regrown weights and their momenta start at zero.

        x [B, D'] and its positives give RigL's dense gradient (in chunks, only now); `seed` and `step` SET's random numbers.
        Returns, of all ranks together, entries, pruned, and moved (those that read another feature now).
        """
        amount, inner, entries = schedule.amount_at(step), self.inner_fan_in, len(self.index) * self.inner_fan_in
        if schedule.prune == "global":
            amount = rewiring.global_threshold(self._magnitudes, entries, amount, ranks)
        if inner < self.fan_in:  # words are no candidates, and their part of the logits is left out
            x = torch.cat([x[:, : self.inner], torch.zeros_like(x[:, self.inner :])], 1) if schedule.method == "rigl" else x
        pruned = moved = 0
        layer = self.layer()
        for rows in self._row_chunks():
            start = rows.start * self.group
            part = layer.part(start, min(rows.stop * self.group, self.labels))
            size = rewiring.magnitude(decode(part.weight[:, :inner]), self.group)
            mask = rewiring.pruned_mask(size, schedule.prune, amount)
            del size
            if inner < self.fan_in:
                mask = F.pad(mask, (0, self.fan_in - inner))
            if schedule.method == "rigl":
                new = self._regrown_by_gradient(part, mask, x.detach(), positives.between(start, start + part.labels))
            else:
                new = self._regrown_at_random(rows, part, mask, seed_of(seed, step))
            pruned += int(mask.sum())
            tensors = (part.weight, part.momentum, part.compensation)
            moved += rewiring.move_(part.index, new, mask, [t for t in tensors if t is not None], self.group)
        counts = ranks.total([entries, pruned, moved])
        return dict(zip(("entries", "pruned", "moved"), map(int, counts), strict=True))

    def _regrown_by_gradient(self, part: Layer, mask: Tensor, x: Tensor, positives: Positives) -> Tensor:
        """New int64 indices of `part`'s rows, others where `mask`."""
        most = max(int(mask.sum(dim=1).max()), 1)
        found = self._kernels().candidates(x, part, positives.labels, positives.documents, most, self.loss)
        if self.inner < self.width:
            found.masked_fill_(found >= self.inner, -1)
        return rewiring.regrow_from(part.index, mask, found)

    def _regrown_at_random(self, rows: _Rows, part: Layer, mask: Tensor, seed: int) -> Tensor:
        score = uniform(seed, rows.block, rows.within, (self._block, self.inner), part.index.device)
        inner = self.inner_fan_in
        words = part.index[:, inner:].to(torch.int64)
        return torch.cat([rewiring.regrow(part.index[:, :inner], mask[:, :inner], score), words], 1)

    def _magnitudes(self) -> Iterator[Tensor]:
        for rows in self._row_chunks():
            own = decode(self._labels_of(self.weight, rows.start, rows.stop))
            yield rewiring.magnitude(own[:, : self.inner_fan_in], self.group)

    def _labels_of(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start * self.group : min(stop * self.group, self.labels)]

    def feature_use(self) -> Tensor:
        """How many index entries, each counted for all labels of its row, read each feature of the encoder's: int64."""
        use = torch.zeros(self.inner, dtype=torch.int64, device=self.index.device)
        for start, stop, *_ in self._row_chunks():
            rows = self.index[start:stop, : self.inner_fan_in].to(torch.int64)
            members = torch.full((len(rows), 1), self.group, dtype=torch.int64, device=rows.device)
            if stop * self.group > self.labels:
                members[-1] = self.labels - (stop - 1) * self.group
            use.index_add_(0, rows.reshape(-1), members.expand_as(rows).reshape(-1))
        return use

    def place(self, name: str) -> tuple[int, int]:
        if name == "index":
            return self.first // self.group, -(-self.whole // self.group)
        return super().place(name)

    def _check_state(self, state: dict[str, Tensor], source: str) -> None:
        super()._check_state(state, source)
        try:
            rewiring.check_index(state["index"], self.width)
            if self.inner < self.width:
                rewiring.check_index(state["index"][:, : self.inner_fan_in], self.inner)
        except ValueError as error:
            raise InputError(f"{source}: {error}; rerun the stage that writes it") from None
