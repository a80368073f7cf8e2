"""Which embedded documents a label has, and the mean of their embeddings, one label chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fanin.data.tokens import TokenSet
from fanin.files import InputError, read_json

GATHER = 32768  # document rows read at once


@dataclass(frozen=True)
class LabelDocuments:
    """The embedded training documents of each label, in compressed rows.

    `members[offsets[l]:offsets[l + 1]]` are label l's positions in `embeddings`, ascending. `frequency` counts all
    training documents of a label, embedded or not, but not those held out for validation.
    """

    embeddings: np.ndarray  # [N, D] float16, memory-mapped
    offsets: np.ndarray  # [L + 1] int64
    members: np.ndarray  # [pairs] int32
    frequency: np.ndarray  # [L] int64
    documents: int  # training documents, those held out for validation left out

    @property
    def labels(self) -> int:
        return len(self.frequency)

    @property
    def width(self) -> int:
        return int(self.embeddings.shape[1])

    @property
    def counts(self) -> np.ndarray:
        """[L] int64: the embedded documents of each label."""
        return np.diff(self.offsets)

    def centroids(self, labels: np.ndarray) -> Tensor:
        """labels [n] -> [n, D] float32: the mean embedding of each one's embedded documents, zeros where it has none.

        Besides the result it holds `GATHER` document rows at a time, however many documents a label has.
        """
        begins = self.offsets[labels]
        counts = self.offsets[labels + 1] - begins
        ends = np.cumsum(counts)
        total = torch.zeros(len(labels), self.width)
        for start in range(0, int(ends[-1]) if len(ends) else 0, GATHER):
            entry = np.arange(start, min(start + GATHER, int(ends[-1])))
            owner = np.searchsorted(ends, entry, side="right")
            member = self.members[begins[owner] + entry - (ends[owner] - counts[owner])]
            rows = torch.from_numpy(self.embeddings[member].astype(np.float32))
            total.index_add_(0, torch.from_numpy(owner), rows)
        return total / torch.from_numpy(counts).clamp_min(1)[:, None]


def load_label_documents(tokens_folder: str | Path, embeddings_folder: str | Path) -> LabelDocuments:
    """Invert the document -> labels lists of the embedded training documents.

    Raises InputError where embeddings.npy, documents.npy and train.arrow do not fit together, or NaN is in the first.
    """
    tokens_folder, embeddings_folder = Path(tokens_folder), Path(embeddings_folder)
    labels = int(read_json(tokens_folder / "tokens.json")["labels"])
    tokens = TokenSet.open(tokens_folder / "train.arrow")
    embeddings, documents = load_embeddings(embeddings_folder, "embeddings.npy", "documents.npy", len(tokens))
    _, held_out = load_embeddings(embeddings_folder, "validation.npy", "validation_documents.npy", len(tokens))
    return label_documents(tokens, labels, embeddings, documents, held_out)


def label_documents(
    tokens: TokenSet, labels: int, embeddings: np.ndarray, documents: np.ndarray, held_out: np.ndarray
) -> LabelDocuments:
    """Those of `labels` labels among the ascending rows `documents` [N] of `tokens`, whose embeddings are `embeddings`
    [N, D]; the rows `held_out` are no training documents."""
    position = np.full(len(tokens), -1, np.int32)
    position[documents] = np.arange(len(documents), dtype=np.int32)
    trained = np.ones(len(tokens), bool)
    trained[held_out] = False
    frequency = tokens.label_frequency(np.flatnonzero(trained), labels)
    offsets, members = invert(tokens, position, labels)
    return LabelDocuments(embeddings, offsets, members, frequency, int(trained.sum()))


def invert(tokens: TokenSet, position: np.ndarray, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents of each label in compressed rows (offsets [labels + 1], members), in two passes over the token set.

    position [N] int32: what a document is called in `members`, ascending; -1 leaves it out.
    """
    counts = np.zeros(labels, np.int64)
    for document, label in tokens.label_pairs():
        counts += np.bincount(label[position[document] >= 0], minlength=labels)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    members = np.empty(offsets[-1], np.int32)
    filled = offsets[:-1].copy()
    for document, label in tokens.label_pairs():
        kept = position[document] >= 0
        order = np.argsort(label[kept], kind="stable")
        sorted_labels = label[kept][order]
        name, first, repeats = np.unique(sorted_labels, return_index=True, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(first, repeats)
        members[filled[sorted_labels] + rank] = position[document][kept][order]
        filled[name] += repeats
    return offsets, members


def load_embeddings(folder: Path, name: str, rows_name: str, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory-map [n, D] float16 embeddings and read their [n] int64 rows of train.arrow, checked against each other.

    Raises InputError naming the file where one is missing, broken, of the wrong shape or type, or not finite.
    """
    embeddings, rows = _load(folder / name), _load(folder / rows_name)
    advice = "rerun the stage embeddings (dvc repro -s -f embeddings)"
    if embeddings.ndim != 2 or embeddings.dtype != np.float16 or embeddings.shape[1] == 0:
        found = f"{embeddings.dtype} {list(embeddings.shape)}"
        raise InputError(f"{folder / name}: expected float16 [documents, width], found {found}; {advice}")
    if rows.shape != (len(embeddings),) or rows.dtype != np.int64:
        raise InputError(
            f"{folder / rows_name}: expected int64 [{len(embeddings)}] to go with {name}, "
            f"found {rows.dtype} {list(rows.shape)}; {advice}"
        )
    if len(rows) and (rows[0] < 0 or rows[-1] >= documents or (np.diff(rows) <= 0).any()):
        raise InputError(
            f"{folder / rows_name}: expected ascending rows below {documents} (the documents of train.arrow), "
            f"found {rows.min()} to {rows.max()}; {advice}"
        )
    for start in range(0, len(embeddings), GATHER):
        wrong = ~np.isfinite(embeddings[start : start + GATHER]).all(1)
        if wrong.any():
            row = start + int(wrong.argmax())
            where = f"{folder / name}, row {row}"
            raise InputError(f"{where}: the embedding of document {rows[row]} is not finite; {advice}")
    return embeddings, rows


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the stage that writes it (dvc repro)") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a whole .npy file ({error}); rerun the stage that writes it") from None
