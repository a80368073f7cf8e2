"""Debian's package index as a corpus: a package's description -> its tags, section and the packages it calls for.

Read from two files of a Debian mirror, as `apt-get update` or a download leaves them in data/raw/debian/: the `Packages`
index of a suite and its `Translation-en`, which holds the long descriptions. Labels are the packages named in Depends,
Pre-Depends and Recommends (versions and architectures left out, every alternative counted), the debtags in Tag,
and the section; a label that covers more than 1 % of the documents says too little and is left out, as one that no
training document has. One description in five is for testing, by a hash of its text: packages that share a
description are on one side. Formats: deb-control(5), Debian Policy 5 and 7.1, the Debian repository format.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from fanin.data.lines import quote
from fanin.data.sources import Document, Facts
from fanin.files import InputError

PACKAGES, TRANSLATION = "Packages", "Translation-en"
RELATIONS = ("Depends", "Pre-Depends", "Recommends")
_PACKAGE_FIELDS = {"Package", "Description", "Description-md5", "Section", "Tag", *RELATIONS}
_TRANSLATION_FIELDS = {"Package", "Description-md5", "Description-en"}
_TOO_COMMON = 0.01  # share of the documents above which a label says too little
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_ARROW_CODECS = {".lz4": "lz4", ".zst": "zstd"}  # what apt itself may keep


class Package(NamedTuple):
    """What the corpus needs of one binary package."""

    name: str
    text: str
    labels: frozenset[str]  # "tag <facet::tag>", "section <name>" or "package <name>"


class Debian:
    """The index as a source. It is small (some 60,000 packages), so it is held in memory."""

    def __init__(self, raw: Path) -> None:
        self.facts = Facts(
            "Debian package index and English descriptions, https://www.debian.org",
            "each description under the licence of its package (its copyright file); not redistributed here",
        )
        self._files = [_find(raw, PACKAGES), _find(raw, TRANSLATION)]
        packages = self._read()
        counts = Counter(label for package in packages for label in package.labels)
        common = {label for label, count in counts.items() if count > _TOO_COMMON * len(packages)}
        kept = [package._replace(labels=package.labels - common) for package in packages]
        self._train = [p for p in kept if p.labels and not _is_test(p.text)]
        self._test = [p for p in kept if p.labels and _is_test(p.text)]
        if not self._train or not self._test:
            raise InputError(
                f"{self._files[0]}: {len(packages)} packages are too few for a training and a test set "
                f"(labels above {100 * _TOO_COMMON:g} % of them are left out); fetch a whole suite's index"
            )
        seen = sorted({label for package in self._train for label in package.labels})
        self._ids = {label: number for number, label in enumerate(seen)}
        self.facts.counts["labels_too_common"] = len(common)

    def files(self) -> list[Path]:
        return self._files

    def train(self) -> Iterator[Document]:
        return self._documents(self._train)

    def test(self) -> Iterator[Document]:
        unseen = sum(label not in self._ids for package in self._test for label in package.labels)
        self.facts.counts["test_labels_unseen"] = unseen
        return self._documents(self._test)

    def labels(self) -> Iterator[str]:
        return iter(self._ids)

    def filtered(self, documents: int) -> None:
        return None

    def _documents(self, packages: list[Package]) -> Iterator[Document]:
        for package in packages:
            yield package.text, sorted(self._ids[label] for label in package.labels if label in self._ids)

    def _read(self) -> list[Package]:
        """All packages that have a description, in the order of their names; a name's first entry counts."""
        index, translation = self._files
        texts: dict[str, str] = {}
        for line, entry in stanzas(translation, _TRANSLATION_FIELDS):
            if not {"Description-md5", "Description-en"} <= set(entry):
                raise InputError(
                    f"{translation}:{line}: an entry without Description-md5 and Description-en; not a {TRANSLATION} file"
                )
            texts.setdefault(entry["Description-md5"], entry["Description-en"])
        packages: dict[str, Package] = {}
        for line, entry in stanzas(index, _PACKAGE_FIELDS):
            if "Package" not in entry:
                raise InputError(f"{index}:{line}: an entry without a Package field; this is not a {PACKAGES} index")
            text = plain(texts.get(entry.get("Description-md5", ""), entry.get("Description", "")))
            if text and entry["Package"] not in packages:
                packages[entry["Package"]] = Package(entry["Package"], text, frozenset(targets(entry)))
        return [packages[name] for name in sorted(packages)]


def stanzas(path: Path, wanted: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The entries of a control file, each with its first line's number and those of its fields that are `wanted`.

    Continuation lines are joined with newlines, their leading blank taken off. Raises InputError with file and line.
    """
    entry: dict[str, str] = {}
    field, first = "", 1
    with _open(path) as file:
        for number, raw in enumerate(_lines(file, path), start=1):
            try:
                line = raw.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                raise InputError(f"{path}:{number}: not UTF-8, found {quote(raw[:40])}; fetch the file again") from None
            if not line.strip():
                if entry:
                    yield first, entry
                entry, field, first = {}, "", number + 1
            elif line[0] in " \t":
                if not field:
                    raise InputError(f"{path}:{number}: a continuation line without a field before it; fetch the file again")
                if field in entry:
                    entry[field] += "\n" + line[1:]
            else:
                field, colon, value = line.partition(":")
                if not colon:
                    raise InputError(f"{path}:{number}: expected `Field: value`, found {quote(line)}; fetch the file again")
                if field in wanted:
                    entry[field] = value.strip()
    if entry:
        yield first, entry


def targets(entry: dict[str, str]) -> Iterator[str]:
    """The labels of an entry: "package <name>", "tag <facet::tag>", "section <name>"."""
    for field in RELATIONS:
        for alternative in re.split(r"[,|]", entry.get(field, "")):
            if name := re.match(r"\s*([a-z0-9][a-z0-9+.-]+)", alternative):
                yield f"package {name[1]}"
    for tag in tags(entry.get("Tag", "")):
        yield f"tag {tag}"
    if section := entry.get("Section"):
        yield f"section {section.rpartition('/')[2]}"


def tags(field: str) -> Iterator[str]:
    """Debtags of a Tag field; braces list several of one facet: `works-with::{audio, video}`."""
    for facet, several, single in re.findall(r"([^\s,:{}]+)::(?:\{([^}]*)\}|([^\s,{}]+))", field):
        for tag in [single] if single else several.split(","):
            if tag.strip():
                yield f"{facet}::{tag.strip()}"


def plain(description: str) -> str:
    """A description as running text: the synopsis, then the paragraphs; a line with a lone full stop is a blank one."""
    synopsis, _, rest = description.partition("\n")
    body = " ".join(word for line in rest.split("\n") if line.strip() != "." for word in line.split())
    return f"{synopsis.strip()}. {body}" if body and synopsis.strip() else synopsis.strip() or body


def _is_test(text: str) -> bool:
    """One description in five, by a hash of its text, so that the split depends on nothing else."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 5 == 0


def _find(raw: Path, name: str) -> Path:
    """The one file of `raw` that is the index or the translation, whatever stands before its name (apt's lists)."""
    suffixes = ("", *_OPENERS, *_ARROW_CODECS)
    found = sorted(path for path in raw.glob(f"*{name}*") if path.name.endswith(tuple(name + s for s in suffixes)))
    if len(found) == 1:
        return found[0]
    trouble = f"{name} missing" if not found else f"{len(found)} files are called {name}: {', '.join(p.name for p in found)}"
    raise InputError(
        f"{raw}: {trouble}; one {name} (plain, or .xz, .gz, .bz2, .lz4, .zst) of a Debian mirror or of apt's lists goes there: "
        f"{raw / 'README.md'} has the commands"
    )


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    if path.suffix in _ARROW_CODECS:
        with pa.input_stream(str(path), compression=_ARROW_CODECS[path.suffix]) as stream:
            yield stream
    else:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            yield file


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines of a stream that may not know what a line is; a damaged file is an InputError."""
    rest, number = b"", 0
    while True:
        try:
            block = file.read(1 << 20)
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
            raise InputError(f"{path}: damaged after line {number} ({error}); fetch the file again") from None
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        number += len(lines)
        yield from lines
    if rest:
        yield rest
