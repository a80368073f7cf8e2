"""The words that labels start with: the heaviest ones of the normalised centroid of each label's documents, and of its own text
where that is to count."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fanin.centroids import invert
from fanin.data.batches import collate
from fanin.data.tokens import TokenSet
from fanin.lexical import Lexical

LIFT = {"bce": 8.0, "squared_hinge": 2.0}  # a start's logit for a document whose words are just a label's
DOCUMENTS = 2**20  # training documents that words are taken from, at most
MEMBERS = 256  # of a label's documents that its words are taken from, at most: a few words need no more
_TOKENS = 2**21  # of documents looked at together, about


class LabelWords:
    """The words of `labels` labels in the training documents `rows` (ascending), of `words` V' there are.

    profiled: at most `profiles` labels that have a profile of `profile_words` words; the others of these stay without
    weight. lift: the length of a row's weights. texts: the labels' own [L], each of which counts `text_share` of one of its
    label's documents.
    """

    def __init__(
        self,
        tokens: TokenSet,
        rows: np.ndarray,
        labels: int,
        words: int,
        *,
        profiled: np.ndarray | None = None,
        profiles: int = 0,
        profile_words: int = 0,
        lift: float = 1.0,
        texts: TokenSet | None = None,
        text_share: float = 0.0,
    ) -> None:
        self._tokens, self._rows, self.words, self._lift = tokens, rows, words, lift
        self._texts, self._text_share = texts, text_share
        profiled = np.empty(0, np.int64) if profiled is None else profiled
        self.lexical = Lexical(words, profiles, profile_words)
        position = np.full(len(tokens), -1, np.int32)
        position[self._rows] = np.arange(len(self._rows), dtype=np.int32)
        self._offsets, self._members = invert(tokens, position, labels)
        mean_length = float(tokens.lengths[self._rows].mean()) if len(self._rows) else 1.0
        self._some = max(int(_TOKENS / max(mean_length, 1.0)), 1)  # documents looked at together
        frequency = np.zeros(words, np.int64)
        for start in range(0, len(self._rows), self._some):
            _, token, _ = self._counts(tokens.ids(self._rows[start : start + self._some]))
            frequency += np.bincount(token, minlength=words)
        self.idf = np.where(frequency > 0, np.log(max(len(self._rows), 1) / np.maximum(frequency, 1)), 0).astype(np.float32)
        self.lexical.idf.copy_(torch.from_numpy(self.idf))
        self._place = np.full(labels, -1, np.int64)  # of a label's profile
        self._place[profiled] = np.arange(len(profiled))
        if self.lexical.profiles is not None and len(profiled):
            index, weight = self._heaviest(profiled, profile_words, 1)
            self.lexical.profiles.index[: len(index)] = index
            self.lexical.profiles.weight[: len(weight)] = weight

    @property
    def width(self) -> int:
        """C + V', the lexical features."""
        return self.lexical.width

    def of(self, labels: np.ndarray, count: int, group: int = 1) -> tuple[Tensor, Tensor]:
        """labels [n], runs of `group` of which share words -> (index [ceil(n / G), count] int64, ascending, weight [n, count]).

        The index is that of lexical features: profiles first. Weights have the length `lift` in each row, or are zero where a
        label has no document; a row with fewer words than `count` is filled up with others, which weigh nothing. A label
        with a profile reads it with weight 1, and its `count` - 1 heaviest words, at first with weight 0: the profile has them.
        """
        index, weight = self._heaviest(labels, count, group)
        index += self.width - self.words
        own = np.flatnonzero(self._place[labels] >= 0)
        if len(own):
            lightest = weight[own].argmin(1)
            index[own, lightest], weight[own] = torch.from_numpy(self._place[labels[own]]), 0.0
            weight[own, lightest] = 1.0
            order = index.argsort(1)
            index, weight = index.gather(1, order), weight.gather(1, order)
        return index, weight

    def features(self, rows: np.ndarray) -> Tensor:
        """Rows of the token set -> their lexical features [n, C + V']."""
        ids, mask = collate(self._tokens.ids(rows), 0)
        return self.lexical(ids, mask)

    def _heaviest(self, labels: np.ndarray, count: int, group: int) -> tuple[Tensor, Tensor]:
        """As `of`, of words alone."""
        parts = [self._of(part, count, group) for part in self._chunks(labels, group)]
        return torch.cat([index for index, _ in parts]), self._lift * torch.cat([weight for _, weight in parts])

    def _chunks(self, labels: np.ndarray, group: int) -> Iterator[np.ndarray]:
        """Whole groups of labels with about `_some` documents."""
        members = np.minimum(np.diff(self._offsets)[labels], MEMBERS)
        part = np.cumsum(np.add.reduceat(members, np.arange(0, len(labels), group))) // self._some
        begins = np.flatnonzero(np.diff(part, prepend=-1)) * group
        return (labels[a:b] for a, b in zip(begins, [*begins[1:], len(labels)], strict=True))

    def _of(self, labels: np.ndarray, count: int, group: int) -> tuple[Tensor, Tensor]:
        n, groups = len(labels), -(-len(labels) // group)
        label, token, value = self._centroids(labels)
        # a group's words are those with the most energy in its labels' rows
        keys, place = np.unique(label // group * self.words + token, return_inverse=True)
        energy = np.bincount(place, value.astype(np.float64) ** 2, len(keys))
        owner, word = keys // self.words, keys % self.words
        order = np.lexsort((-energy, owner))
        rank = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
        best = np.sort(order[rank < count])
        index = np.full((groups, count), -1, np.int64)
        sizes = np.bincount(owner[best], minlength=groups)
        column = np.arange(len(best)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        index[owner[best], column] = word[best]
        some = np.arange(min(2 * count, self.words))
        for row in np.flatnonzero(sizes < count):
            other = np.setdiff1d((some + row) % self.words, index[row, : sizes[row]])
            index[row, sizes[row] :] = other[: count - sizes[row]]
        index.sort(axis=1)
        weight = np.zeros((n, count), np.float32)
        wanted = index + np.arange(groups)[:, None] * self.words
        flat = wanted.ravel()
        found = np.minimum(np.searchsorted(flat, label // group * self.words + token), len(flat) - 1)
        kept = flat[found] == label // group * self.words + token
        weight[label[kept], found[kept] % count] = value[kept]
        weight /= np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-12)
        return torch.from_numpy(index), torch.from_numpy(weight)

    def _centroids(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries (label's place, token, value) of unit length a label, in the order of label and token."""
        begins, ends = self._offsets[labels], self._offsets[labels + 1]
        sizes = np.minimum(ends - begins, MEMBERS)
        label = np.repeat(np.arange(len(labels)), sizes)
        place = np.arange(len(label)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        member = self._members[begins[label] + place * (ends - begins)[label] // np.maximum(sizes, 1)[label]]
        documents, which = np.unique(member, return_inverse=True)
        document, token, value = self._features(self._tokens.ids(self._rows[documents]))
        first = np.searchsorted(document, np.arange(len(documents) + 1))
        lengths = np.diff(first)[which]
        entry = np.repeat(first[which] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        label, token, value = np.repeat(label, lengths), token[entry], value[entry]
        if self._texts is not None:
            named, word, weight = self._features(self._texts.ids(labels))
            label, token = np.concatenate([label, named]), np.concatenate([token, word])
            value = np.concatenate([value, self._text_share * weight])
        keys, place = np.unique(label * self.words + token, return_inverse=True)
        total = np.bincount(place, value, len(keys))
        label, token = keys // self.words, keys % self.words
        norm = np.sqrt(np.bincount(label, total**2, len(labels)))
        return label, token, (total / np.maximum(norm[label], 1e-12)).astype(np.float32)

    def _features(self, ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids of some texts -> entries (text's place, token, value) as `Lexical` makes them, but of unit length."""
        document, token, count = self._counts(ids)
        value = (1 + np.log(count)) * self.idf[token]
        norm = np.sqrt(np.bincount(document, value**2, len(ids)))
        return document, token, value / np.maximum(norm[document], 1e-12)

    def _counts(self, ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids of some texts -> entries (text's place, token, count), in that order."""
        document = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
        token = np.concatenate([*ids, np.empty(0, np.int64)]).astype(np.int64) % self.words
        keys, count = np.unique(document * self.words + token, return_counts=True)
        return keys // self.words, keys % self.words, count
