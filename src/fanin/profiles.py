"""Word profiles: rows of words of their own for the most frequent labels, each read by the head as one feature.

A label of thousands of documents is told by many words, and a row of the head has room for a few; rows of two lengths would
cost every kernel its one loop. So one label in `EVERY`, the most frequent ones, has a profile, where it has the documents to
learn one from: `head.profiles` weighted words, whose sum over a document is a feature behind the encoder's, which the label's
row reads in place of a word. The start makes it of the heaviest words of the label's documents; then it learns from what the
head's step hands back for that feature, by the head's own rate and momentum. All profiles together take the bytes of one entry
a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fanin.files import InputError
from fanin.kernels.layer import Update, index_dtype

if TYPE_CHECKING:
    from fanin.config import Head

EVERY = 64  # labels, of which the most frequent one has a profile
MOST = 2**13  # profiles: features that an index of two bytes must name, beside the words and the encoder's
_READ = 2**20  # floats read from documents at once


def profile_count(head: Head, labels: int) -> int:
    """C: how many of `labels` labels have a profile. None where labels share their rows: they would share the profile too."""
    wanted = head.kind == "fixed_fan_in" and head.profiles and head.lexical and head.group == 1
    return min(labels // EVERY, MOST) if wanted else 0


def choose_profiled(frequency: np.ndarray, count: int, words: int) -> np.ndarray:
    """The labels with a profile of `words` words: the `count` most frequent, of those with as many training documents as words.

    Fewer documents than weights teach a profile nothing that a short row does not know.
    """
    chosen = np.argsort(-frequency, kind="stable")[:count]
    return chosen[frequency[chosen] >= words]


class Profiles(nn.Module):
    """C profiles of M of V' words: index [C, M], ascending in each row, and weight [C, M] float32."""

    index: Tensor
    weight: Tensor
    momentum: Tensor | None

    def __init__(self, count: int, words: int, vocabulary: int) -> None:
        super().__init__()
        if words > vocabulary:
            raise InputError(f"head.profiles: {words} is above the {vocabulary} tokens of the encoder; lower it")
        self.register_buffer("index", torch.arange(words).repeat(count, 1).to(index_dtype(vocabulary)))
        self.register_buffer("weight", torch.zeros(count, words))
        self.prepare_training(0.0)

    def __len__(self) -> int:
        return len(self.weight)

    def prepare_training(self, momentum: float) -> None:
        """Allocate the optimiser's state (none for momentum 0)."""
        self.register_buffer("momentum", torch.zeros_like(self.weight) if momentum else None)

    @torch.no_grad()
    def forward(self, words: Tensor) -> Tensor:
        """words [B, V'] -> [B, C], the sum of each profile's."""
        parts = [torch.einsum("cmb,cm->bc", read, self.weight[own]) for own, read in self._read(words)]
        return torch.cat(parts, 1)

    @torch.no_grad()
    def gradient(self, words: Tensor, outer: Tensor) -> Tensor:
        """words [B, V'] and the gradient of `forward`'s result [B, C] -> the weights' gradient [C, M]."""
        return torch.cat([torch.einsum("cmb,bc->cm", read, outer[:, own]) for own, read in self._read(words)])

    def in_use(self) -> int:
        """How many hold any weight: fewer than C where labels have too few documents."""
        return int(self.weight.any(dim=1).sum())

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float, momentum: float) -> None:
        """One step of SGD, in place; `gradient` is overwritten."""
        Update(lr=lr, momentum=momentum).apply(self.weight, gradient, self.momentum)

    def _read(self, words: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Runs of profiles, with what their words are in each document [c, M, B]."""
        turned, size = words.t().contiguous(), max(_READ // (self.index.shape[1] * len(words)), 1)
        for start in range(0, len(self), size):
            own = slice(start, start + size)
            index = self.index[own].to(torch.int64)
            yield own, turned[index.flatten()].view(*index.shape, -1)
