"""What is minimised beside the loss in the head's own step: the positives of a batch, the objective on meta-labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Positives(NamedTuple):
    """The positive (label, document) pairs of one batch, each once, sorted by label, then document."""

    labels: Tensor  # [P] int64, rows of the head
    documents: Tensor  # [P] int64 in 0..B-1

    def to(self, device: torch.device | str) -> Positives:
        return Positives(self.labels.to(device), self.documents.to(device))

    def between(self, first: int, last: int) -> Positives:
        """Those of labels first..last-1, which are counted from `first`."""
        bounds = torch.tensor([first, last], device=self.labels.device)
        own = slice(*torch.searchsorted(self.labels, bounds).tolist())
        return Positives(self.labels[own] - first, self.documents[own])

    def of_documents(self, first: int, last: int) -> Positives:
        """Those of documents first..last-1, which are counted from `first`."""
        own = (self.documents >= first) & (self.documents < last)
        return Positives(self.labels[own], self.documents[own] - first)

    def valid(self, labels: int, documents: int) -> Tensor:
        """bool []: every pair in range and in order. On the device, so that the caller decides when to wait for it."""
        if not len(self.labels):
            return torch.ones((), dtype=torch.bool, device=self.labels.device)
        ordered = (self.labels[1:] >= self.labels[:-1]).all() & (self.labels[0] >= 0) & (self.labels[-1] < labels)
        return ordered & (self.documents >= 0).all() & (self.documents < documents).all()

    def explain(self, labels: int, documents: int) -> None:
        """Raise ValueError that says what `valid` found wrong."""
        if (self.labels[1:] < self.labels[:-1]).any():
            raise ValueError("positives: label ids must be sorted; they are not")
        for name, values, limit in (("label", self.labels, labels), ("document", self.documents, documents)):
            wrong = values[(values < 0) | (values >= limit)]
            if len(wrong):
                raise ValueError(f"positives: {name} {int(wrong[0])} is outside 0..{limit - 1}")


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
