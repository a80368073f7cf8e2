"""Ranking a token set with a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from fanin.data.batches import collate
from fanin.data.tokens import TokenSet

if TYPE_CHECKING:
    from fanin.model import Classifier

Pairs = tuple[np.ndarray, np.ndarray]  # documents and labels of (document, label) pairs


def rank(
    classifier: Classifier,
    tokens: TokenSet,
    rows: np.ndarray,
    k: int,
    batch: int,
    filtered: Pairs | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels of each of `rows`, in the order given: labels [N, k] int32, scores [N, k] float32, best first.

    Exact: `filtered` pairs (rows of the token set, labels) are left out by asking for as many more labels as a batch's
    document can lose. Where there are fewer than k labels to rank, -1 and a score of -inf fill the rest.

    batch: documents at once; they are taken longest first, so that padding is little and a batch too large for the
    memory fails at once. progress: called with the number of documents that each batch finished. Runs where the
    classifier lies and in its precision; in eval mode, and leaves its mode as it was.
    """
    rows = np.asarray(rows, dtype=np.int64)
    labels = np.full((len(rows), k), -1, dtype=np.int32)
    scores = np.full((len(rows), k), -np.inf, dtype=np.float32)
    known = classifier.labels
    excluded = _Excluded(filtered, known) if filtered is not None and len(filtered[0]) else None
    pad_id = classifier.tokenizer.pad_token_id or 0  # a model without one: the mask hides the padding anyway
    order = np.argsort(-tokens.lengths[rows], kind="stable")
    training = classifier.training
    classifier.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                places = order[start : start + batch]
                asked = k + (excluded.most(rows[places]) if excluded else 0)
                ids, mask = collate(tokens.ids(rows[places]), pad_id)
                best = classifier.topk(ids.to(classifier.device), mask.to(classifier.device), min(asked, known))
                found_scores, found = (tensor.cpu().numpy() for tensor in best)
                if excluded:
                    found, found_scores = excluded.drop(rows[places], found, found_scores)
                width = min(k, found.shape[1])
                labels[places, :width] = found[:, :width]
                scores[places, :width] = found_scores[:, :width]
                if progress is not None:
                    progress(len(places))
    finally:
        classifier.train(training)
    return labels, scores


class _Excluded:
    """Pairs to leave out, as one sorted number each."""

    def __init__(self, pairs: Pairs, labels: int) -> None:
        documents, targets = (np.asarray(part, dtype=np.int64) for part in pairs)
        self._labels = labels
        self._keys = np.unique(documents * labels + targets)

    def most(self, rows: np.ndarray) -> int:
        """The most labels that any of these rows leaves out."""
        first, last = (np.searchsorted(self._keys, (rows + more) * self._labels) for more in (0, 1))
        return int((last - first).max(initial=0))

    def drop(self, rows: np.ndarray, found: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`found` [B, n] with the excluded labels taken out and the others moved up; -1 and -inf at the end."""
        keys = rows[:, None] * self._labels + found
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        out = self._keys[place] == keys
        order = np.argsort(out, axis=1, kind="stable")
        return (
            np.take_along_axis(np.where(out, -1, found), order, axis=1),
            np.take_along_axis(np.where(out, -np.inf, scores), order, axis=1),
        )
