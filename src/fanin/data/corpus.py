"""The corpus stage: any raw layout to `data/corpus/`, streamed.

Documents go to parquet in row groups; what stays in memory is one row group and one count a label.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fanin.config import Config, Corpus
from fanin.data.debian import Debian
from fanin.data.sources import Document, Facts, OwnParquet, Source
from fanin.data.synthetic import Synthetic
from fanin.data.wordnet import SYNSETS, WordNet
from fanin.data.xc import PUBLISHED, REPOSITORY, XcJson, XcRaw, XcSparse
from fanin.files import InputError, atomic_path

DOCUMENTS = pa.schema([("text", pa.string()), ("labels", pa.list_(pa.int32()))])
LABELS = pa.schema([("id", pa.int32()), ("text", pa.string()), ("frequency", pa.int32())])
FILTER = pa.schema([("document", pa.int32()), ("label", pa.int32())])
ROW_GROUP = 16384  # documents; the peak in memory grows with it
_ROW_GROUP_CHARACTERS = 32 << 20  # long documents end a row group earlier


def build_corpus(config: Config, raw: Path, out: Path) -> dict[str, Any]:
    """Read the raw files in `raw` as `config.corpus` says, write `out` whole or not at all; returns corpus.json's content.

    Raises InputError for whatever is wrong in the raw files, with file and line, and where `out` cannot be written.
    """
    source = open_source(config.corpus, raw)
    with atomic_path(out, directory=True) as folder:
        counts = _write(source, folder, config.corpus.label_documents)
        facts = {
            "name": _name(config),
            **counts,
            **source.facts.counts,
            "source": source.facts.source,
            "licence": source.facts.licence,
            "checksum": _checksum(source.files(), source.facts.recipe),
        }
        (folder / "corpus.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts


def open_source(corpus: Corpus, raw: Path) -> Source:
    """The source that `corpus.format` names, over the folder `raw`. Raises InputError where files are missing."""
    if corpus.format == "wordnet":
        return WordNet(raw, corpus.task)
    if corpus.format == "debian":
        return Debian(raw)
    if corpus.format == "synthetic":
        return Synthetic(
            raw.parent / "wordnet" / SYNSETS,
            labels=corpus.labels,
            documents=corpus.documents,
            test_documents=corpus.test_documents,
            labels_per_document=corpus.labels_per_document,
        )
    facts = Facts(f"{raw.name} ({corpus.format})", "not stated in the files")
    if raw.name in PUBLISHED:
        facts = Facts(f"{PUBLISHED[raw.name]}, Extreme Classification Repository, {REPOSITORY}", "as stated by the source")
    layouts: dict[str, Callable[[Path, Facts], Source]] = {
        "xc_json": XcJson,
        "xc_sparse": XcSparse,
        "xc_raw": XcRaw,
        "parquet": OwnParquet,
    }
    return layouts[corpus.format](raw, facts)


def _name(config: Config) -> str:
    corpus = config.corpus
    return config.preset + {"wordnet": f"-{corpus.task}", "synthetic": f"-{corpus.labels}"}.get(corpus.format, "")


def _write(source: Source, folder: Path, label_documents: bool) -> dict[str, Any]:
    frequency = Frequency()
    with pq.ParquetWriter(folder / "train.parquet", DOCUMENTS, compression="zstd") as writer:
        train, _ = _write_documents(writer, frequency.counting(source.train()))
        labels = _write_labels(source, folder / "labels.parquet", frequency)
        if labels < 2:
            raise InputError(f"{source.files()[0].parent}: the corpus has {labels} label; a classifier needs at least 2")
        if label_documents:
            _write_documents(writer, ((text, [label]) for label, text in enumerate(source.labels())))
    with pq.ParquetWriter(folder / "test.parquet", DOCUMENTS, compression="zstd") as writer:
        test, unlabelled = _write_documents(writer, source.test())
    pairs = source.filtered(test)
    filtered = 0 if pairs is None else _write_filter(pairs, folder / "filter.parquet")
    return {
        "train_documents": train,
        "test_documents": test,
        "label_documents": labels if label_documents else 0,
        "labels": labels,
        "labels_per_document": round(frequency.total / train, 4),
        "labels_seen_once": frequency.seen_once(),
        "test_documents_unlabelled": unlabelled,
        "filtered_pairs": filtered,
    }


class Frequency:
    """Training documents a label, in an array that grows with the ids seen."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, np.int32)
        self._waiting: list[int] = []
        self.total = 0  # label assignments

    def counting(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Hand the documents on and count their labels."""
        for document in documents:
            self._waiting.extend(document[1])
            if len(self._waiting) > 1 << 20:
                self._count()
            yield document
        self._count()

    def _count(self) -> None:
        counts = np.bincount(np.array(self._waiting, np.int64), minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts.astype(np.int32)
        self.total += len(self._waiting)
        self._waiting.clear()

    def seen_once(self) -> int:
        return int((self._counts == 1).sum())

    def of(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] int32 counts of the labels from `start`; 0 for labels that no document had."""
        counts = np.zeros(stop - start, np.int32)
        known = self._counts[start:stop]
        counts[: len(known)] = known
        return counts


def _write_documents(writer: pq.ParquetWriter, documents: Iterable[Document]) -> tuple[int, int]:
    """Write documents in row groups; returns how many there were, and how many of them without labels."""
    total, unlabelled, characters = 0, 0, 0
    texts: list[str] = []
    labels: list[list[int]] = []

    def flush() -> None:
        nonlocal total, characters
        if texts:
            writer.write_table(pa.table([texts, labels], schema=DOCUMENTS))
        total, characters = total + len(texts), 0
        texts.clear()
        labels.clear()

    for text, ids in documents:
        texts.append(text)
        labels.append(ids)
        unlabelled += not ids
        characters += len(text)
        if len(texts) == ROW_GROUP or characters > _ROW_GROUP_CHARACTERS:
            flush()
    flush()
    return total, unlabelled


def _write_labels(source: Source, path: Path, frequency: Frequency) -> int:
    total = 0
    with pq.ParquetWriter(path, LABELS, compression="zstd") as writer:
        for texts in _chunks(source.labels(), 4 * ROW_GROUP):
            stop = total + len(texts)
            ids = np.arange(total, stop, dtype=np.int32)
            writer.write_table(pa.table([ids, texts, frequency.of(total, stop)], schema=LABELS))
            total = stop
    return total


def _write_filter(pairs: Iterable[tuple[int, int]], path: Path) -> int:
    total = 0
    with pq.ParquetWriter(path, FILTER, compression="zstd") as writer:
        for chunk in _chunks(pairs, 16 * ROW_GROUP):
            array = np.array(chunk, np.int32)
            writer.write_table(pa.table([array[:, 0], array[:, 1]], schema=FILTER))
            total += len(chunk)
    return total


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _checksum(files: list[Path], recipe: str) -> str:
    """sha256 over the recipe, if there is one, and the files' names and bytes, in the given order."""
    digest = hashlib.sha256(recipe.encode())
    for path in files:
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
