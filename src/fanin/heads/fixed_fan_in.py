"""The head that this project is about: every label reads K features, groups of G labels share which."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fanin import kernels, rewiring
from fanin.files import InputError
from fanin.heads.head import Head
from fanin.kernels import Backend, Layer, Update
from fanin.kernels.layer import FAN_IN_LIMIT, WEIGHT_TYPES, decode, index_dtype
from fanin.objectives import Positives


class FixedFanIn(Head):
    """z[b, l] = bias[l] + sum_k weight[l, k] x[b, index[l // G, k]]. Weight [L, K], index [ceil(L/G), K].

    dtype: what the weights are stored in. Below float32 momentum is kept in bfloat16, and sums are rounded stochastically, or
    (rounding "kahan") to nearest with the loss carried in a bfloat16 compensation [L, K].
    backend: the kernels, as in `kernels.backend`.
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
    ) -> None:
        super().__init__(labels, width, loss)
        if fan_in > width:
            raise InputError(
                f"head.fan_in: {fan_in} is above the {width} features that the head reads; lower it, or raise head.intermediate"
            )
        if fan_in > FAN_IN_LIMIT:
            raise InputError(f"head.fan_in: {fan_in} is above {FAN_IN_LIMIT}, the most that the kernels take; lower it")
        if dtype not in WEIGHT_TYPES:
            raise InputError(f"head.dtype: {dtype} is not one of {', '.join(map(str, WEIGHT_TYPES))}")
        self.fan_in, self.group, self.rounding, self.backend = fan_in, group, rounding, backend
        kernels.backend(backend)  # a name that cannot run is an error now
        bound = 1 / math.sqrt(fan_in)
        self.register_buffer("weight", torch.empty(labels, fan_in, dtype=dtype))
        self.register_buffer("index", torch.empty(-(-labels // group), fan_in, dtype=index_dtype(width)))
        for start, stop in self._row_chunks():
            score = torch.rand(stop - start, width, generator=generator)
            self.index[start:stop].copy_(score.topk(fan_in, dim=1).indices.sort(dim=1).values)
            part = self._labels_of(self.weight, start, stop)
            part.copy_(torch.empty(part.shape).uniform_(-bound, bound, generator=generator))
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
        )

    def _kernels(self) -> Backend:
        return kernels.backend(self.backend, self.weight.device, self.weight.dtype)

    def _row_chunks(self) -> Iterator[tuple[int, int]]:
        """Chunks of index rows for which a [rows * G, D'] dense gradient takes about 16 MiB."""
        rows = -(-self.labels // self.group)
        size = max(2**22 // (self.width * self.group), 1)
        for start in range(0, rows, size):
            yield start, min(start + size, rows)

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
        layer = self.layer()
        for start, stop in self._row_chunks():
            part = layer.part(start * self.group, min(stop * self.group, self.labels))
            mask = rewiring.pruned_mask(rewiring.magnitude(decode(part.weight), self.group), schedule.prune, amount)
            new = self._regrown(part, mask, schedule.method, generator, x.detach(), positives)
            pruned += int(mask.sum())
            tensors = (part.weight, part.momentum, part.compensation)
            moved += rewiring.move_(part.index, new, mask, [t for t in tensors if t is not None], self.group)
        return {"entries": self.index.numel(), "pruned": pruned, "moved": moved}

    def _regrown(
        self, part: Layer, mask: Tensor, method: str, generator: torch.Generator, x: Tensor, positives: Positives
    ) -> Tensor:
        """New int64 indices of `part`'s rows, others where `mask`."""
        if method == "rigl":
            most = max(int(mask.sum(dim=1).max()), 1)
            own = positives.between(part.first, part.first + part.labels)
            candidates = self._kernels().candidates(x, part, own.labels, own.documents, most, self.loss)
            return rewiring.regrow_from(part.index, mask, candidates)
        return rewiring.regrow(part.index, mask, torch.rand(len(mask), self.width, generator=generator, device=x.device))

    def _magnitudes(self) -> Iterator[Tensor]:
        for start, stop in self._row_chunks():
            yield rewiring.magnitude(decode(self._labels_of(self.weight, start, stop)), self.group)

    def _labels_of(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start * self.group : min(stop * self.group, self.labels)]

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
        try:
            rewiring.check_index(state["index"], self.width)
        except ValueError as error:
            raise InputError(f"{source}: {error}; rerun the stage that writes it") from None
