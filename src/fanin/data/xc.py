"""The Extreme Classification Repository's file layouts, as its users have them on disk; each file may end in `.gz`.

- `xc_json`: trn.json, tst.json and lbl.json, one JSON object a line: `title`, `content` (one of the two may be missing;
  both are joined) and, for documents, `target_ind` (label ids); `target_rel` is checked, other keys are passed over.
  Instead of lbl.json, Y.txt with one label text a line.
- `xc_sparse`: trn_X.txt and tst_X.txt (one text a line), trn_X_Y.txt and tst_X_Y.txt (a header `rows columns`, then
  `label:value ...` for each row), Y.txt. The texts may lie in a folder `raw/`.
- `xc_raw`: train_raw_texts.txt, train_labels.txt, test_raw_texts.txt, test_labels.txt: one text a line, and label names
  between blanks. Labels are numbered as they first appear in training; test labels that never do are dropped and counted.

Filter lists (`filter_labels_test.txt` or `tst_filter_labels.txt`, with the first two layouts): a line is `row label`, a
pair of the test set that stays out of the ranking, because document and label are one thing. The list for the training
set is not read: it serves those who rank training documents, and training keeps all its targets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fanin.data.lines import check_labels, check_text, count_lines, find, parse_integer, quote, read_lines
from fanin.data.sources import Document, Facts
from fanin.files import InputError

REPOSITORY = "http://manikvarma.org/downloads/XC/XMLRepository.html"
PUBLISHED = {  # preset: the data set's name in the repository
    "wiki10-31k": "Wiki10-31K",
    "lf-amazontitles-131k": "LF-AmazonTitles-131K",
    "lf-wikiseealso-320k": "LF-WikiSeeAlso-320K",
    "wiki-500k": "Wiki-500K",
    "amazon-670k": "Amazon-670K",
    "amazon-3m": "Amazon-3M",
}
_TEST_FILTER = ("filter_labels_test.txt", "tst_filter_labels.txt")


class _Layout:
    """What the layouts have in common: their files, found or reported missing all at once, and the filter list."""

    name: str
    wanted: dict[str, tuple[str, ...]]  # what it is: the names it may have

    def __init__(self, raw: Path, facts: Facts) -> None:
        self.facts = facts
        found = {what: find(raw, *names) for what, names in self.wanted.items()}
        missing = [names[0] for what, names in self.wanted.items() if found[what] is None]
        if missing:
            readme = f"; {raw / 'README.md'} says more" if (raw / "README.md").is_file() else ""
            raise InputError(
                f"{raw}: {', '.join(missing)} missing. The layout {self.name} needs "
                f"{', '.join(names[0] for names in self.wanted.values())} there, each plain or with .gz behind its name; "
                f"published data sets come from the Extreme Classification Repository, {REPOSITORY}{readme}"
            )
        self._paths: dict[str, Path] = {what: path for what, path in found.items() if path is not None}
        self._filter = find(raw, *_TEST_FILTER)

    def files(self) -> list[Path]:
        return [*self._paths.values(), *([self._filter] if self._filter else [])]

    def filtered(self, documents: int) -> Iterator[tuple[int, int]] | None:
        return None if self._filter is None else self._read_filter(self._filter, documents)

    def _read_filter(self, path: Path, documents: int) -> Iterator[tuple[int, int]]:
        for place, line in read_lines(path):
            fields = line.split()
            if len(fields) != 2:
                raise InputError(f"{place}: expected `row label`, found {quote(line)}; correct the line")
            row = parse_integer(fields[0], "the row", place)
            if not 0 <= row < documents:
                raise InputError(f"{place}: row {row} is out of range; there are {documents} test documents, rows start at 0")
            (label,) = check_labels([parse_integer(fields[1], "the label id", place)], self._label_count(), place, empty=False)
            yield row, label

    def _label_count(self) -> int:
        raise NotImplementedError


class _LabelFile(_Layout):
    """A layout that lists its labels in a file of their own."""

    _count = 0

    def _label_count(self) -> int:
        if not self._count:
            self._count = count_lines(self._paths["labels"])
        return self._count

    def labels(self) -> Iterator[str]:
        for place, line in read_lines(self._paths["labels"]):
            yield check_text(line, place)


class XcJson(_LabelFile):
    name = "xc_json"
    wanted = {"train": ("trn.json",), "test": ("tst.json",), "labels": ("lbl.json", "Y.txt")}  # noqa: RUF012

    def train(self) -> Iterator[Document]:
        return self._documents(self._paths["train"], empty=False)

    def test(self) -> Iterator[Document]:
        return self._documents(self._paths["test"], empty=True)

    def labels(self) -> Iterator[str]:
        if self._paths["labels"].name.startswith("Y.txt"):
            yield from super().labels()
            return
        for place, record in _records(self._paths["labels"]):
            yield check_text(_string(record, "title", place) or _string(record, "content", place), place)

    def _documents(self, path: Path, *, empty: bool) -> Iterator[Document]:
        labels = self._label_count()
        for place, record in _records(path):
            if "title" not in record and "content" not in record:
                raise InputError(f"{place}: neither `title` nor `content` among the keys {quote(sorted(record))}; add one")
            text = check_text(f"{_string(record, 'title', place)} {_string(record, 'content', place)}", place)
            yield text, check_labels(_target_ids(record, place), labels, place, empty=empty)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in read_lines(path):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            detail = f"{error.msg} at position {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
            raise InputError(f"{place}: not valid JSON ({detail}): {quote(line)}; correct the line") from None
        if type(record) is not dict:
            raise InputError(f"{place}: expected a JSON object a line, found {quote(record)}; correct the line")
        yield place, record


def _string(record: dict[str, Any], key: str, place: str) -> str:
    value = record.get(key, "")
    if type(value) is not str:
        raise InputError(f"{place}: `{key}` must be a string, found {quote(value)}; correct the line")
    return value.strip()


def _target_ids(record: dict[str, Any], place: str) -> list[int]:
    ids = record.get("target_ind")
    if type(ids) is not list:
        found = f"found {quote(ids)}" if "target_ind" in record else f"the keys are {quote(sorted(record))}"
        raise InputError(f"{place}: `target_ind` must be a list of label ids, {found}; correct the line")
    if not set(map(type, ids)) <= {int}:  # true and 1.0 are no ids
        wrong = next(id for id in ids if type(id) is not int)
        raise InputError(f"{place}: label id {quote(wrong)} is not a whole number; correct `target_ind`")
    relevance = record.get("target_rel")
    if relevance is not None:
        if type(relevance) is not list or len(relevance) != len(ids):
            raise InputError(f"{place}: `target_rel` must be a list as long as `target_ind` ({len(ids)}); correct the line")
        for value in relevance:
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InputError(f"{place}: `target_rel` holds {quote(value)}, which is not a finite number; correct the line")
    return ids


class XcSparse(_LabelFile):
    name = "xc_sparse"
    wanted = {  # noqa: RUF012
        "train": ("trn_X.txt", "raw/trn_X.txt"),
        "train_labels": ("trn_X_Y.txt",),
        "test": ("tst_X.txt", "raw/tst_X.txt"),
        "test_labels": ("tst_X_Y.txt",),
        "labels": ("Y.txt", "raw/Y.txt"),
    }

    def train(self) -> Iterator[Document]:
        return self._documents("train", empty=False)

    def test(self) -> Iterator[Document]:
        return self._documents("test", empty=True)

    def _documents(self, part: str, *, empty: bool) -> Iterator[Document]:
        labels = self._label_count()
        texts, rows = self._paths[part], self._paths[f"{part}_labels"]
        for (text_place, text), (place, ids) in _paired(texts, read_lines(texts), rows, _sparse_rows(rows, labels)):
            yield check_text(text, text_place), check_labels(ids, labels, place, empty=empty)


def _sparse_rows(path: Path, labels: int) -> Iterator[tuple[str, list[int]]]:
    lines = read_lines(path)
    place, header = next(lines)
    fields = header.split()
    if len(fields) != 2:
        raise InputError(f"{place}: expected the header `rows columns`, found {quote(header)}; add it")
    rows, columns = (parse_integer(field, "a count in the header", place) for field in fields)
    if columns != labels:
        raise InputError(f"{place}: the header says {columns} labels, but the label file has {labels}; correct one of them")
    count = 0
    for place, line in lines:
        count += 1
        if count > rows:
            raise InputError(f"{place}: the header says {rows} rows, but here is one more; correct the header or the rows")
        yield place, [_sparse_entry(entry, place) for entry in line.split()]
    if count < rows:
        raise InputError(f"{path}:{count + 1}: the header says {rows} rows, but the file ends after {count}; fetch it again")


def _sparse_entry(entry: str, place: str) -> int:
    label, colon, value = entry.partition(":")
    try:
        usable = bool(colon) and 0 < float(value) < math.inf  # NaN fails too
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"{place}: expected `label:value` with a value above 0, found {quote(entry)}; correct the entry")
    return parse_integer(label, "a label id", place)


class XcRaw(_Layout):
    name = "xc_raw"
    wanted = {  # noqa: RUF012
        "train": ("train_raw_texts.txt",),
        "train_labels": ("train_labels.txt",),
        "test": ("test_raw_texts.txt",),
        "test_labels": ("test_labels.txt",),
    }

    def __init__(self, raw: Path, facts: Facts) -> None:
        super().__init__(raw, facts)
        self._ids: dict[str, int] = {}  # filled by train()

    def train(self) -> Iterator[Document]:
        self._ids.clear()
        ids = self._ids
        for text, names, place in self._lines("train"):
            numbers = [ids.setdefault(name, len(ids)) for name in names]
            yield text, _named_labels(numbers, names, len(ids), place, empty=False)

    def test(self) -> Iterator[Document]:
        unseen = 0
        for text, names, place in self._lines("test"):
            known = [name for name in names if name in self._ids]
            unseen += len(names) - len(known)
            yield text, _named_labels([self._ids[name] for name in known], known, len(self._ids), place, empty=True)
        self.facts.counts["test_labels_unseen"] = unseen

    def labels(self) -> Iterator[str]:
        return (name.replace("_", " ").strip() or name for name in self._ids)

    def _label_count(self) -> int:
        return len(self._ids)

    def _lines(self, part: str) -> Iterator[tuple[str, list[str], str]]:
        texts, names = self._paths[part], self._paths[f"{part}_labels"]
        for (place, text), (label_place, line) in _paired(texts, read_lines(texts), names, read_lines(names)):
            # /SEP/ stands between title and body in these copies
            yield check_text(text.replace("/SEP/", " "), place), line.split(), label_place


def _named_labels(ids: list[int], names: list[str], labels: int, place: str, *, empty: bool) -> list[int]:
    if len(set(ids)) < len(ids):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{place}: label {quote(twice)} is repeated; name each label of a document once")
    return check_labels(ids, labels, place, empty=empty)


def _paired(
    texts: Path, lines: Iterator[tuple[str, str]], rows: Path, labels: Iterator[tuple[str, Any]]
) -> Iterator[tuple[tuple[str, str], tuple[str, Any]]]:
    """Texts and labels side by side. Raises InputError where one of the files ends before the other."""
    for text in lines:
        row = next(labels, None)
        if row is None:
            raise InputError(f"{text[0]}: a text without a line of labels, {rows} ends before it; fetch both files again")
        yield text, row
    extra = next(labels, None)
    if extra is not None:
        raise InputError(f"{extra[0]}: labels without a text, {texts} ends before them; fetch both files again")
