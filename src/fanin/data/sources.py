"""What a corpus is read from: the interface of a raw layout, and our own parquet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from fanin.data.lines import check_labels, check_text, quote
from fanin.files import InputError

Document = tuple[str, list[int]]  # text, label ids (sorted, unique)
_BATCH = 4096  # rows decoded at a time


@dataclass
class Facts:
    """What corpus.json says about a source, beside the counts that come from its documents."""

    source: str  # where the data comes from
    licence: str
    recipe: str = ""  # what decides the content beside the files; part of the checksum
    counts: dict[str, int] = field(default_factory=dict)  # what a reader left out, filled while it reads


class Source(Protocol):
    """One raw corpus. Readers stream: nothing of a document's size is kept between two documents.

    Everything that the iterators yield has been checked; what is wrong raises InputError with the file and the line.
    `train` is read to its end before `labels` and `test`: some layouts collect the label names from it.
    """

    facts: Facts

    def files(self) -> list[Path]:
        """The files that are read, for the checksum, in a fixed order."""
        ...

    def train(self) -> Iterator[Document]:
        """Training documents, each with at least one label."""
        ...

    def test(self) -> Iterator[Document]:
        """Test documents; a document may have no label."""
        ...

    def labels(self) -> Iterator[str]:
        """The labels' texts; the n-th is that of label n."""
        ...

    def filtered(self, documents: int) -> Iterator[tuple[int, int]] | None:
        """Pairs (row of test, label) that stay out of the ranking; None where the source has no such list.

        `documents` is the number of test documents.
        """
        ...


class OwnParquet:
    """train.parquet and test.parquet (`text`, `labels`), labels.parquet (`id`, `text`), optional filter.parquet.

    The columns are those of `data/corpus/`; other columns are passed over. Rows are counted from 0.
    """

    def __init__(self, raw: Path, facts: Facts) -> None:
        self.facts = facts
        self._train, self._test, self._labels = (raw / f"{name}.parquet" for name in ("train", "test", "labels"))
        missing = [path.name for path in (self._train, self._test, self._labels) if not path.is_file()]
        if missing:
            raise InputError(
                f"{raw}: {', '.join(missing)} missing; the format parquet needs train.parquet and test.parquet (text: string, "
                "labels: list of integers) and labels.parquet (id: integer, text: string) there, and takes a filter.parquet "
                "(document: integer, label: integer); or choose another corpus.format"
            )
        self._filter = raw / "filter.parquet"
        self._count = 0

    def files(self) -> list[Path]:
        return [self._train, self._test, self._labels, *([self._filter] if self._filter.is_file() else [])]

    def train(self) -> Iterator[Document]:
        return self._documents(self._train, empty=False)

    def test(self) -> Iterator[Document]:
        return self._documents(self._test, empty=True)

    def labels(self) -> Iterator[str]:
        for row, (id, text) in _rows(self._labels, id="integer", text="string"):
            place = f"{self._labels}:row {row}"
            if id != row:
                raise InputError(f"{place}: label id {id}, expected {row}; list the labels from 0 in the order of their ids")
            yield check_text(text, place)

    def filtered(self, documents: int) -> Iterator[tuple[int, int]] | None:
        return self._pairs(documents) if self._filter.is_file() else None

    def _label_count(self) -> int:
        if not self._count:
            self._count = _open(self._labels).metadata.num_rows
        return self._count

    def _documents(self, path: Path, *, empty: bool) -> Iterator[Document]:
        labels = self._label_count()
        for row, (text, ids) in _rows(path, text="string", labels="list of integers"):
            place = f"{path}:row {row}"
            if None in ids:
                raise InputError(f"{place}: a label id is null; correct `labels`")
            yield check_text(text, place), check_labels(ids, labels, place, empty=empty)

    def _pairs(self, documents: int) -> Iterator[tuple[int, int]]:
        labels = self._label_count()
        for row, (document, label) in _rows(self._filter, document="integer", label="integer"):
            place = f"{self._filter}:row {row}"
            if not 0 <= document < documents:
                raise InputError(f"{place}: document {document} is out of range; there are {documents} test documents")
            check_labels([label], labels, place, empty=False)
            yield document, label


_TYPES = {
    "string": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
    "integer": pa.types.is_integer,
    "list of integers": lambda t: (pa.types.is_list(t) or pa.types.is_large_list(t)) and pa.types.is_integer(t.value_type),
}


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file ({_first_line(error)}); write it again") from None
    if not file.metadata.num_rows:
        raise InputError(f"{path} holds no rows; write it again, or remove it where it is optional")
    return file


def _rows(path: Path, **columns: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(row, values) of the given columns, which must have the given types. Raises InputError for nulls, broken UTF-8."""
    with _open(path) as file:
        schema = file.schema_arrow
        for name, wanted in columns.items():
            found = schema.field(name).type if name in schema.names else None
            if found is None or not _TYPES[wanted](found):
                raise InputError(f"{path}: column `{name}` must be a {wanted}, found {found or 'none'}; write the file again")
        first = 0
        batches = file.iter_batches(_BATCH, columns=list(columns))
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path}: damaged after row {first} ({_first_line(error)}); write it again") from None
            if batch is None:
                return
            values = [_decode(batch.column(name), name, path, first) for name in columns]
            yield from enumerate(zip(*values, strict=True), start=first)
            first += batch.num_rows


def _decode(column: pa.Array, name: str, path: Path, first: int) -> list[Any]:
    if column.null_count:
        row = first + column.is_null().to_pylist().index(True)
        raise InputError(f"{path}:row {row}: `{name}` is null; give it a value or remove the row")
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for offset, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                found = quote(bytes(error.object)[:20])
                raise InputError(f"{path}:row {first + offset}: `{name}` is not UTF-8, found {found}; convert it") from None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
