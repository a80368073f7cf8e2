"""Length-bucketed batches whose order depends on (seed, epoch) alone, so that a run can resume at any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fanin.data.tokens import TokenSet
from fanin.files import InputError
from fanin.objectives import Positives
from fanin.ranks import ALONE, Ranks

WINDOW = 64  # batches sorted by length together: little padding, and still a fresh mix every epoch
_SPLIT_STREAM = 0x5B117  # keeps the split's random numbers apart from the batches' for the same seed
_OTHERS_STREAM = 0x30D5  # and those of `enlarge`


@dataclass
class Batch:
    """One micro-batch of B documents, b of them this rank's to encode (all, where there is one rank), padded to T tokens."""

    rows: np.ndarray  # [B] int64 rows of the TokenSet
    ids: Tensor  # [b, T] int64
    mask: Tensor  # [b, T] int64, 1 where there is a token
    positives: Positives  # of all B documents

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        positives = Positives(*(tensor.to(device, non_blocking=True) for tensor in self.positives))
        return Batch(self.rows, self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True), positives)


class Batches:
    """Batches over `rows` of a token set; `len` is the batches an epoch, the last partial one counted.

    An epoch shuffles the documents, sorts each window of 64 batches by length, cuts it into batches and shuffles those.
    `label_rows` [L] gives each label's row of the head, where the head orders its labels in a way of its own.
    Ranks get the same batches, each the tokens of its own share of a batch's documents.
    """

    def __init__(
        self,
        tokens: TokenSet,
        rows: np.ndarray,
        batch: int,
        seed: int,
        pad_id: int,
        label_rows: np.ndarray | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._tokens, self._batch, self._seed, self._pad_id, self._ranks = tokens, batch, seed, pad_id, ranks
        self._rows = np.asarray(rows, dtype=np.int64)
        self._label_rows = None if label_rows is None else np.asarray(label_rows, dtype=np.int64)
        if not self._rows.size:
            raise InputError("train.validation_documents: no document is left to train on; lower it")

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's rows [N] and the order of its batches: batch i is rows[order[i] * B : (order[i] + 1) * B]."""
        rng = np.random.default_rng([self._seed, epoch])
        rows = rng.permutation(self._rows)
        window = np.arange(len(rows)) // (WINDOW * self._batch)
        rows = rows[np.lexsort((self._tokens.lengths[rows], window))]  # stable: the shuffle decides among equal lengths
        return rows, rng.permutation(len(self))

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number `skip` on, just as they would have come without skipping.

        Raises ValueError where `skip` is not in 0..len.
        """
        if not 0 <= skip <= len(self):
            raise ValueError(f"skip is {skip}, but an epoch has {len(self)} batches")
        rows, order = self.order(epoch)
        for number in order[skip:]:
            yield self.assemble(rows[number * self._batch : (number + 1) * self._batch])

    def assemble(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, in this order."""
        ids, mask = collate(self._tokens.ids(rows[slice(*self._ranks.share(len(rows)))]), self._pad_id)
        labels = self._tokens.labels(rows)
        return Batch(rows, ids, mask, positives(labels, self._label_rows))


def collate(ids: Sequence[np.ndarray | Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad B documents to their longest: ids [B, T] and mask [B, T], both int64."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
    padded = np.full(mask.shape, pad_id, np.int64)
    if lengths.any():
        padded[mask] = np.concatenate(ids)
    return torch.from_numpy(padded), torch.from_numpy(mask.astype(np.int64))


def positives(labels: Sequence[np.ndarray], label_rows: np.ndarray | None = None) -> Positives:
    """The (label, document) pairs of B label lists, sorted by the label's row of the head, then by document."""
    documents = np.repeat(np.arange(len(labels)), [len(row) for row in labels])
    flat = np.concatenate(labels).astype(np.int64) if len(documents) else np.empty(0, np.int64)
    if label_rows is not None:
        flat = label_rows[flat]
    order = np.argsort(flat, kind="stable")  # the documents are ascending already
    return Positives(torch.from_numpy(flat[order]), torch.from_numpy(documents[order]))


def enlarge(chosen: np.ndarray, documents: int, held_out: np.ndarray, budget: int, seed: int) -> np.ndarray:
    """Ascending int64 rows: those `chosen`, and others of 0 to documents - 1 drawn at random until they are `budget`; none of
    `held_out`."""
    other = np.ones(documents, bool)
    other[chosen] = other[held_out] = False
    rest, left = np.flatnonzero(other), max(budget - len(chosen), 0)
    if len(rest) > left:
        rest = np.random.default_rng([seed, _OTHERS_STREAM]).choice(rest, left, replace=False)
    return np.union1d(chosen, rest)


def split(documents: int, validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and validation rows of 0..documents-1, both ascending int64; the same for the same arguments.

    Raises InputError where no document would be left to train on.
    """
    if validation >= documents:
        raise InputError(
            f"train.validation_documents: {validation} of only {documents} training documents leave none to train on; lower it"
        )
    held_out = np.zeros(documents, bool)
    held_out[np.random.default_rng([seed, _SPLIT_STREAM]).choice(documents, validation, replace=False)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
