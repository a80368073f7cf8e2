"""The protocol that all heads share, and the checks of what they are given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fanin import rewiring
from fanin.files import InputError
from fanin.kernels import Update
from fanin.kernels.layer import LOSSES
from fanin.objectives import Positives
from fanin.ranks import ALONE, Ranks

_TRAINING_BUFFERS = ("momentum", "bias_momentum", "projection_momentum", "compensation")


class Head(nn.Module, ABC):
    """What every head has: a step on embeddings and targets, logits, top-k, rewiring, its bytes.

    labels: L; width: D', the features it reads; loss: bce or squared_hinge; part: the first and one past the last of the
    labels that this process holds, where it shares them with other ranks (whole groups of them). Everywhere below, L and
    the numbers of labels are then those of its own part; random numbers are those of the whole. bias: false where its
    `parts` have them.
    """

    bias: Tensor
    momentum: Tensor | None
    bias_momentum: Tensor | None

    def __init__(
        self, labels: int, width: int, loss: str = "bce", part: tuple[int, int] | None = None, *, bias: bool = True
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise InputError(f"head.loss: {loss!r} is not one of {', '.join(LOSSES)}")
        self.first, last = part or (0, labels)
        self.whole, self.labels, self.width, self.loss = labels, last - self.first, width, loss
        self.inner = width  # of the features, those of the encoder: behind them a head may read words
        self.learnt = width  # and those that `step` returns dx of: the encoder's, and sums of words
        if bias:
            self.register_buffer("bias", torch.full((self.labels,), resting_logit(labels, loss)))

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def parts(self) -> list[tuple[int, Head]]:
        """The heads that it consists of, each of one kind of rows, with the row that each one's first row is."""
        return [(0, self)]

    # training -----------------------------------------------------------------------------------------------------

    def prepare_training(self, momentum: float) -> None:
        """Allocate the optimiser's state (none for momentum 0)."""
        for name, like, dtype in self._momenta():
            self.register_buffer(name, torch.zeros_like(like, dtype=dtype) if momentum else None)

    def finish_training(self) -> None:
        """Free the optimiser's state."""
        for name in _TRAINING_BUFFERS:
            if name in self._buffers:
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
        seed: int = 0,
        want_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Forward, backward and update in one pass over the labels.

        x [B, D'] float32 -> (dx [B, D'], without that of single words where the head reads them; summed loss [] or None).
        The loss is summed over labels and documents; `scale` multiplies the gradient that updates the head, not dx (1 / B
        makes the update that of a mean).
        dx is taken with the weights from before the update. seed: of stochastic rounding, another one every step.

        Raises, before anything is written: ValueError where shapes or devices do not fit, the batch is empty, or a positive
        is out of range or out of order; FloatingPointError, naming the documents, where x holds NaN or infinite values.
        """
        self._check(x, positives)
        update = Update(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=scale, seed=seed)
        return self._step(x.detach(), positives, update, want_loss)

    def _check(self, x: Tensor, positives: Positives) -> None:
        if x.ndim != 2 or x.shape[1] != self.width or not len(x):
            raise ValueError(f"x must be [B, {self.width}] with B at least 1, found {list(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"x is on {x.device}, but the head on {self.device}; move one of them")
        fine = torch.stack([x[:, : self.learnt].isfinite().all(), positives.valid(self.labels, len(x))])
        finite, valid = fine.tolist()  # one wait for the device
        if not finite:
            documents = (~x[:, : self.learnt].isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise FloatingPointError(f"x holds NaN or infinite values, in documents {documents[:20]} of the batch")
        if not valid:
            positives.explain(self.labels, len(x))

    @abstractmethod
    def _step(self, x: Tensor, positives: Positives, update: Update, want_loss: bool) -> tuple[Tensor, Tensor | None]:
        """What `step` does, on checked input."""

    @abstractmethod
    def _momenta(self) -> list[tuple[str, Tensor, torch.dtype]]:
        """The momenta's names, each with a tensor of its shape and its type."""

    def rewire(
        self, schedule: rewiring.Schedule, step: int, seed: int, x: Tensor, positives: Positives, ranks: Ranks = ALONE
    ) -> dict[str, float]:
        """Prune and regrow; only a sparse head can."""
        raise InputError(
            f"rewiring.method: {schedule.method} needs head.kind fixed_fan_in or head_tail; set rewiring.method to none"
        )

    # inference ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [B, D'] -> logits of rows start..stop-1 [B, stop - start]."""

    @torch.no_grad()
    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x [B, D'] -> (scores [B, k], rows [B, k] int64), highest first, exact; k at most L. Never holds all logits."""
        if not 1 <= k <= self.labels:
            raise ValueError(f"k must be 1 to {self.labels} (the number of labels), found {k}")
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"x must be [B, {self.width}], found {list(x.shape)}")
        return self._topk(x, k)

    @abstractmethod
    def _topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What `topk` does, on a checked k."""

    # state --------------------------------------------------------------------------------------------------------

    def place(self, name: str) -> tuple[int, int]:
        """Which row of the whole head's tensor `name` this part's first row is, and how many the whole has."""
        return self.first, self.whole

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
            parts = value.flatten().split(2**24) if value.is_floating_point() else ()
            if not all(part.to(torch.float32).isfinite().all() for part in parts):  # float8 has no isfinite of its own
                raise InputError(f"{source}: {key} holds NaN or infinite values; rerun the stage that writes it")


def resting_logit(labels: int, loss: str) -> float:
    """Of a label that never fires: the logit of one label a document, or the hinge's margin."""
    return -math.log(labels + 1) if loss == "bce" else -1.0
