"""Words as features of a sparse head, beside those of the encoder.

A dense layer cannot read a vocabulary: every label would pay for every word. A label that reads a few features pays for
those few. So the head reads, behind the encoder's D' features, V' of which nearly all are zero: the document's tokens,
weighted by tf-idf, to a length of `NORM`. The start from data gives each label its `head.lexical` heaviest words, those of the
normalised centroid of its documents (Rocchio's classifier, cut off); training moves their weights as all others. Words rank
well where names decide, embeddings where meaning does: XR-Transformer (Zhang et al., NeurIPS 2021) joins both for its
rankers. Tokens are the encoder's own: no other tokeniser is needed, and nothing new in a request. Between both lie the C
sums of `Profiles`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fanin.profiles import Profiles, profile_count

if TYPE_CHECKING:
    from fanin.config import Head

NORM = 16.0  # of a document's words: of unit length, each would be so small that training hardly moved its weights
_INDICES = 2**16  # features that an index of two bytes can name


def lexical_width(vocabulary: int, width: int) -> int:
    """V', the lexical features behind `width` of the encoder's: the vocabulary, or fewer (tokens then share some) where the
    head's indices would need more than two bytes."""
    return min(vocabulary, max(_INDICES - width, _INDICES // 2))


def lexical_sizes(head: Head, vocabulary: int, width: int, labels: int) -> tuple[int, int]:
    """C and V': the profiles and words that a head of `labels` labels reads behind `width` features of the encoder's."""
    if not head.sparse or not head.lexical:
        return 0, 0
    profiles = profile_count(head, labels)
    return profiles, lexical_width(vocabulary, width + profiles)


class Lexical(nn.Module):
    """Token ids to the head's lexical features, C profiles and V' words.

    idf [V']: 0 for tokens that say nothing or were never seen. words: V'; profiles, profile_words: C and M of `Profiles`.
    """

    idf: Tensor

    def __init__(self, words: int, profiles: int = 0, profile_words: int = 0) -> None:
        super().__init__()
        self.words, self.width = words, profiles + words
        self.register_buffer("idf", torch.zeros(words))
        self.profiles = Profiles(profiles, profile_words, words) if profiles else None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, T] -> [B, C + V'], as `write`."""
        out = self.idf.new_zeros(len(ids), self.width)
        self.write(out, ids, mask)
        return out

    def write(self, out: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Write (1 + log count) idf of the tokens ids [B, T] under mask [B, T], to length `NORM`, and before it the profiles'
        sums of that, into the zeros `out` [B, C + V']."""
        words = out[:, self.width - self.words :]
        ids, mask = ids % self.words, mask.to(out.dtype)
        count = words.scatter_add_(1, ids, mask).gather(1, ids).clamp_min_(1)
        words.scatter_(1, ids, 0.0)
        each = (1 + count.log()) * self.idf[ids] * mask / count  # a token that comes n times brings an nth each time
        length = (each.square() * count).sum(1, keepdim=True).sqrt().clamp_min_(1e-12)
        words.scatter_add_(1, ids, each * (NORM / length))
        if self.profiles is not None and len(out):
            out[:, : len(self.profiles)] = self.profiles(words)
