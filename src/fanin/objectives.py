"""What is minimised: the two losses over all labels, and the auxiliary objective on meta-labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSSES = ("bce", "squared_hinge")


class Positives(NamedTuple):
    """The positive (label, document) pairs of one batch, each once, sorted by label, then document."""

    labels: Tensor  # [P] int64, rows of the head
    documents: Tensor  # [P] int64 in 0..B-1

    def to(self, device: torch.device | str) -> Positives:
        return Positives(self.labels.to(device), self.documents.to(device))

    def ranges(self, labels: int, chunk: int) -> list[int]:
        """Where each chunk of `chunk` labels begins in the list, and its end: one host sync a step, not one a chunk."""
        bounds = torch.arange(0, labels + chunk, chunk, device=self.labels.device)
        return torch.searchsorted(self.labels, bounds).tolist()


def logit_gradient_(z: Tensor, rows: Tensor, columns: Tensor, loss: str, want_loss: bool) -> Tensor | None:
    """Turn logits z [l, B] in place into dL/dz; (rows, columns) [p] are the positive places of z.

    Returns the summed loss [] if `want_loss`, else None.
    bce: log(1 + e^z) - yz with y in {0, 1}; squared_hinge: max(0, 1 - yz)^2 with y in {-1, 1}.
    Raises ValueError for an unknown loss.
    """
    value = None
    if loss == "bce":
        if want_loss:
            value = F.softplus(z).sum() - z[rows, columns].sum()
        z.sigmoid_()
        z[rows, columns] -= 1
    elif loss == "squared_hinge":
        positive = (1 - z[rows, columns]).clamp_(min=0)
        z.add_(1).clamp_(min=0)
        if want_loss:
            value = z.square().sum() - z[rows, columns].square().sum() + positive.square().sum()
        z.mul_(2)
        z[rows, columns] = -2 * positive
    else:
        raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
    return value


class AuxiliaryObjective(nn.Module):
    """A dense layer from the embedding to meta-labels, with (1 - lambda) * main + lambda * meta as the joint loss.

    A document's meta-labels are the clusters of its labels; binary cross-entropy, summed over meta-labels and documents.
    lambda falls on a cosine from `weight` at step 0 to 0 at `cutoff_step`; from there on the branch should be dropped.
    Source: "Navigating Extremes: Dynamic Sparsity in Large Output Spaces", NeurIPS 2024 (arXiv 2411.03171), section 3.
    """

    meta: Tensor

    def __init__(self, width: int, meta: Tensor, weight: float, cutoff_step: int) -> None:
        """meta [L] int64: the meta-label of each row of the head."""
        super().__init__()
        self.weight, self.cutoff_step = weight, cutoff_step
        self.register_buffer("meta", meta, persistent=False)
        self.layer = nn.Linear(width, int(meta.max()) + 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def coefficient(self, step: int) -> float:
        """lambda at optimiser step `step`."""
        if step >= self.cutoff_step:
            return 0.0
        return self.weight * 0.5 * (1 + math.cos(math.pi * step / self.cutoff_step))

    def forward(self, embedding: Tensor, positives: Positives) -> Tensor:
        """embedding [B, D] -> the meta loss [] (not yet multiplied by lambda)."""
        target = torch.zeros(len(embedding), self.layer.out_features, device=embedding.device)
        target[positives.documents, self.meta[positives.labels]] = 1
        return F.binary_cross_entropy_with_logits(self.layer(embedding), target, reduction="sum")
