"""Tokenised documents: written once as Arrow, read memory-mapped by row.

Ids are stored without padding, in the smallest integer type that holds the vocabulary. Writing streams, and reading
touches only the pages of the rows asked for, so neither needs memory that grows with the corpus but for 4 bytes a
document (`TokenSet.lengths`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fanin.files import InputError, atomic_path, read_json, write_json

_AGAIN = "rerun the tokens stage (dvc repro -f tokens)"
_CORPUS_AGAIN = "rerun the corpus stage (dvc repro -f corpus)"
LABELS = "labels.arrow"  # the labels' own texts, a row a label id, without labels
ROWS_A_BATCH = 8192  # rows of one record batch; the last of a file may hold fewer
MANY_CUT = 0.2  # of the documents: more of them cut are worth a warning


class TokenSet:
    """One memory-mapped token file; `len` is its number of documents N."""

    def __init__(self, batches: list[pa.RecordBatch], path: Path) -> None:
        self.path = path
        self._rows_a_batch = batches[0].num_rows if batches else 1
        self._ids = [_views(batch.column("ids")) for batch in batches]
        self._labels = [_views(batch.column("labels")) for batch in batches]
        self._documents = sum(batch.num_rows for batch in batches)

    @classmethod
    def open(cls, path: str | Path) -> TokenSet:
        """Map the file. Raises InputError where it is missing, truncated or not a token file."""
        path = Path(path)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except FileNotFoundError:
            raise InputError(f"{path} is missing; run the tokens stage (dvc repro tokens)") from None
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is truncated or not an Arrow file ({_first_line(error)}); {_AGAIN}") from None
        if reader.schema not in (_schema(pa.uint16()), _schema(pa.int32())):
            found = ", ".join(f"{field.name}: {field.type}" for field in reader.schema)
            raise InputError(
                f"{path}: expected columns ids (uint16 or int32 lists) and labels (int32 lists), found {found}; {_AGAIN}"
            )
        try:
            for batch in batches:
                batch.validate()
        except pa.ArrowException as error:
            raise InputError(f"{path} is damaged ({_first_line(error)}); {_AGAIN}") from None
        sizes = [batch.num_rows for batch in batches]
        if sizes and (min(sizes) < 1 or len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]):
            raise InputError(f"{path}: its record batches differ in size, so it was written by something else; {_AGAIN}")
        return cls(batches, path)

    def __len__(self) -> int:
        return self._documents

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] int32: tokens a document, special tokens included. Raises InputError where the file's offsets are damaged."""
        lengths = np.empty(len(self), np.int32)
        start = 0
        for offsets, values in self._ids:
            counts = np.diff(offsets)
            if counts.min() < 1 or offsets[-1] > len(values):
                raise InputError(f"{self.path} is damaged (impossible row lengths); {_AGAIN}")
            lengths[start : start + len(counts)] = counts
            start += len(counts)
        return lengths

    def ids(self, rows: np.ndarray) -> list[np.ndarray]:
        """Token ids of each row, as read-only views of the file. Raises InputError for a row out of range."""
        return self._take(self._ids, rows)

    def labels(self, rows: np.ndarray) -> list[np.ndarray]:
        """Label ids (int32, sorted) of each row, as read-only views. Raises InputError for a row out of range."""
        return self._take(self._labels, rows)

    def label_pairs(self, chunk: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every (document, label) pair in document order: int64 rows and int32 labels, about `chunk` documents at a time."""
        group = max(1, chunk // self._rows_a_batch)
        for first in range(0, len(self._labels), group):
            documents, labels = [], []
            for number in range(first, min(first + group, len(self._labels))):
                offsets, values = self._labels[number]
                rows = np.arange(number * self._rows_a_batch, number * self._rows_a_batch + len(offsets) - 1)
                documents.append(np.repeat(rows, np.diff(offsets)))
                labels.append(values[offsets[0] : offsets[-1]])
            yield np.concatenate(documents), np.concatenate(labels)

    def label_frequency(self, rows: np.ndarray, labels: int) -> np.ndarray:
        """[labels] int64: how many of `rows` have each label. Raises InputError where one is out of range."""
        counted = np.zeros(len(self), bool)
        counted[rows] = True
        frequency = np.zeros(labels, np.int64)
        for documents, found in self.label_pairs():
            kept = found[counted[documents]]
            if kept.size and kept.max() >= labels:
                raise InputError(
                    f"{self.path}: label {kept.max()} is outside 0..{labels - 1}; rerun corpus and tokens (dvc repro -f tokens)"
                )
            frequency += np.bincount(kept, minlength=labels)
        return frequency

    def _take(self, views: list[tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> list[np.ndarray]:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            wrong = rows[(rows < 0) | (rows >= len(self))][0]
            raise InputError(
                f"{self.path}: row {wrong} is outside 0..{len(self) - 1}; rerun the stages after tokens (dvc repro)"
            )
        taken = []
        for batch, row in zip((rows // self._rows_a_batch).tolist(), (rows % self._rows_a_batch).tolist(), strict=True):
            offsets, values = views[batch]
            taken.append(values[offsets[row] : offsets[row + 1]])
        return taken


@dataclass
class Written:
    """What `write_tokens` counted."""

    documents: int = 0
    tokens: int = 0
    truncated: int = 0  # documents cut at max_length


def write_tokens(
    batches: Iterable[pa.RecordBatch], path: str | Path, tokenizer: Any, *, max_length: int, rows_a_batch: int = ROWS_A_BATCH
) -> Written:
    """Tokenise (text, labels) record batches into one token file, a record batch of `rows_a_batch` rows at a time.

    `tokenizer` is a Hugging Face tokenizer; documents are cut at `max_length` tokens, special tokens counted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # all cores, and no warning when a later child is forked
    kind = pa.uint16() if vocabulary_size(tokenizer) <= 2**16 else pa.int32()
    schema = _schema(kind)
    written = Written()
    with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in _rebatch(batches, rows_a_batch):
            ids, truncated = _encode(tokenizer, batch.column("text").to_pylist(), max_length)
            offsets = np.zeros(len(ids) + 1, np.int64)
            np.cumsum([len(row) for row in ids], out=offsets[1:])
            values = np.fromiter((token for row in ids for token in row), kind.to_pandas_dtype(), count=int(offsets[-1]))
            columns = [
                pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
                batch.column("labels").cast(schema.field("labels").type),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            written.documents += len(ids)
            written.tokens += int(offsets[-1])
            written.truncated += truncated
    return written


def tokenize_corpus(corpus: str | Path, out: str | Path, tokenizer: Any, *, max_length: int, encoder: str) -> dict[str, Any]:
    """Tokenise a corpus folder's train.parquet and test.parquet, and the texts of labels.parquet, into the folder `out`; return
    what its tokens.json holds.

    Raises InputError where the corpus is missing, damaged or lacks a column.
    """
    corpus = Path(corpus)
    about = read_json(corpus / "corpus.json")
    with atomic_path(out, directory=True) as folder:
        parts = {
            part: write_tokens(_read(corpus / f"{part}.parquet"), folder / f"{part}.arrow", tokenizer, max_length=max_length)
            for part in ("train", "test")
        }
        write_tokens(_read(corpus / "labels.parquet", labels=False), folder / LABELS, tokenizer, max_length=max_length)
        documents = sum(part.documents for part in parts.values())
        summary = {
            "documents": {name: part.documents for name, part in parts.items()},
            "label_documents": about.get("label_documents", 0),
            "labels": about["labels"],
            "vocabulary": vocabulary_size(tokenizer),
            "pad_id": tokenizer.pad_token_id or 0,  # a model without one: the mask hides the padding anyway
            "max_length": max_length,
            "mean_length": sum(part.tokens for part in parts.values()) / max(documents, 1),
            "truncated": sum(part.truncated for part in parts.values()) / max(documents, 1),
            "encoder": encoder,
        }
        write_json(folder / "tokens.json", summary)
    if summary["truncated"] > MANY_CUT:
        print(
            f"warning: tokens.max_length: {summary['truncated']:.0%} of the documents are longer than {max_length} tokens, and "
            "what is beyond is not read; raise it if time allows",
            file=sys.stderr,
        )
    return summary


def vocabulary_size(tokenizer: Any) -> int:
    """The highest token id plus one (ids may have gaps, so this can exceed the number of tokens)."""
    return max(tokenizer.get_vocab().values()) + 1


def _encode(tokenizer: Any, texts: list[str], max_length: int) -> tuple[list[list[int]], int]:
    """Token ids of each text, and how many texts were cut."""
    if not tokenizer.is_fast:
        full = tokenizer(texts)["input_ids"]
        cut = [i for i, row in enumerate(full) if len(row) > max_length]
        if cut:
            shorter = tokenizer([texts[i] for i in cut], truncation=True, max_length=max_length)["input_ids"]
            for i, row in zip(cut, shorter, strict=True):
                full[i] = row
        return full, len(cut)
    # The backend alone: the wrapper would build a mask and type ids, as Python lists, for every document.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length)
    encodings = backend.encode_batch_fast(texts)
    return [encoding.ids for encoding in encodings], sum(bool(encoding.overflowing) for encoding in encodings)


def _read(path: Path, labels: bool = True) -> Iterator[pa.RecordBatch]:
    """Stream text and labels of a corpus file, a bounded number of rows at a time; without `labels`, of none."""
    columns = ["text", "labels"] if labels else ["text"]
    try:
        with pq.ParquetFile(path) as file:
            missing = set(columns) - set(file.schema_arrow.names)
            if missing:
                raise InputError(f"{path} has no column {', '.join(sorted(missing))}; {_CORPUS_AGAIN}")
            with tqdm(total=file.metadata.num_rows, desc=f"tokens of {path.name}", unit="doc", disable=None) as bar:
                for batch in file.iter_batches(ROWS_A_BATCH, columns=columns):
                    yield batch if labels else batch.append_column("labels", _none(batch.num_rows))
                    bar.update(batch.num_rows)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the corpus stage (dvc repro corpus)") from None
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read ({_first_line(error)}); {_CORPUS_AGAIN}") from None


def _none(rows: int) -> pa.Array:
    """A column of empty lists of labels."""
    return pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1, np.int32)), pa.array([], pa.int32()))


def _rebatch(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly `rows`, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        while batch.num_rows:
            part = batch.slice(0, rows - held)
            batch = batch.slice(part.num_rows)
            waiting.append(part)
            held += part.num_rows
            if held == rows:
                yield pa.concat_batches(waiting)
                waiting, held = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def _views(column: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a list column, without a copy."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def _schema(kind: pa.DataType) -> pa.Schema:
    return pa.schema({"ids": pa.large_list(kind), "labels": pa.large_list(pa.int32())})


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
