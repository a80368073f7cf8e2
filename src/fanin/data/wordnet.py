"""The bundled WordNet 3.0: parsing its database files, and the two tasks derived from its synsets.

`near`: a synset's lemmas and definition; its labels are all its hypernyms, direct and inherited, of classes and of
instances, but those that cover more than 1 % of the documents. `relations`: the same text; its labels are all synsets
that any of its pointers leads to. Labels that no training document has are left out of the label space; a test document
whose labels are all of that kind stays, with none: leaving it out would make the test set easier than the task.

The database's format is described in WordNet's manual page wndb(5WN).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fanin.data.sources import Document, Facts
from fanin.files import InputError, atomic_path

SYNSETS = "synsets.parquet"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # part of speech and offset: n02084071
        ("lemmas", pa.list_(pa.string())),
        ("gloss", pa.string()),
        ("pointers", pa.list_(pa.struct([("symbol", pa.string()), ("target", pa.string())]))),
    ]
)
_FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}
_HYPERNYMS = {"@", "@i"}  # of a class, of an instance
_TOO_COMMON = 0.01  # share of the documents above which a hypernym says too little to be a label
_LABEL_CHARACTERS = 60  # of a definition that tells two labels of the same lemmas apart


class Synset(NamedTuple):
    """One line of a data.* file."""

    id: str
    lemmas: list[str]
    gloss: str
    pointers: list[tuple[str, str]]  # (symbol, target's id), each once: lexical pointers are taken at synset level


def parse(folder: Path) -> Iterator[Synset]:
    """Read data.{noun,verb,adj,adv} of a WordNet database folder. Raises InputError with file and line."""
    for part, name in _FILES.items():
        path = folder / name
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); give the folder that holds {name}") from None
        for number, line in enumerate(lines, start=1):
            if line.startswith(b"  "):  # the licence
                continue
            try:
                yield _parse_line(part, line.decode())
            except (ValueError, IndexError):
                raise InputError(f"{path}:{number}: not a synset line as in wndb(5WN); fetch the file again") from None


def _parse_line(part: str, line: str) -> Synset:
    data, bar, gloss = line.partition(" | ")
    fields = data.split()
    if not bar or len(fields[0]) != 8:
        raise ValueError
    words = int(fields[3], 16)  # hexadecimal, unlike the pointer count
    lemmas = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * words : 2]]
    start = 4 + 2 * words
    end = start + 1 + 4 * int(fields[start])
    symbols, offsets, parts = (fields[start + column : end : 4] for column in (1, 2, 3))
    pointers = {
        (symbol, target_part.replace("s", "a") + offset)  # satellites (s) share a file with the other adjectives
        for symbol, offset, target_part in zip(symbols, offsets, parts, strict=True)
    }
    return Synset(part + fields[0], lemmas, gloss.strip(), sorted(pointers))


def build(dictionary: Path, raw: Path) -> int:
    """Write `synsets.parquet` and the licence found in the database files to `raw`; returns the number of synsets."""
    synsets = sorted(parse(dictionary))
    table = pa.table(
        {
            "id": [s.id for s in synsets],
            "lemmas": [s.lemmas for s in synsets],
            "gloss": [s.gloss for s in synsets],
            "pointers": [[{"symbol": symbol, "target": target} for symbol, target in s.pointers] for s in synsets],
        },
        schema=SCHEMA,
    )
    header = [line for line in (dictionary / _FILES["n"]).read_text("utf-8").splitlines() if line.startswith("  ")]
    licence = "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in header) + "\n"
    with atomic_path(raw / SYNSETS) as path:
        pq.write_table(
            table,
            path,
            compression="zstd",
            compression_level=19,
            # Dictionaries do not pay where nearly every value is new: 4.9 MB instead of 5.4.
            use_dictionary=["pointers.list.element.symbol"],
            column_encoding={"gloss": "DELTA_LENGTH_BYTE_ARRAY", "lemmas.list.element": "DELTA_LENGTH_BYTE_ARRAY"},
        )
    with atomic_path(raw / "LICENSE") as path:
        path.write_text(licence, encoding="utf-8")
    return len(synsets)


class WordNet:
    """The `near` or the `relations` task as a source. It is small, so it is held in memory."""

    def __init__(self, raw: Path, task: str) -> None:
        self.facts = Facts("WordNet 3.0, https://wordnet.princeton.edu", "WordNet 3.0 licence (data/raw/wordnet/LICENSE)")
        self._path = raw / SYNSETS
        synsets = self._read()
        targets = _hypernyms(synsets) if task == "near" else _targets(synsets)
        train = {id: labels for id, labels in targets.items() if not _is_test(id)}
        seen = sorted({label for labels in train.values() for label in labels})
        self._ids = {id: number for number, id in enumerate(seen)}
        self._synsets = synsets
        self._train = train
        self._test = {id: labels for id, labels in targets.items() if _is_test(id)}

    def _read(self) -> dict[str, Synset]:
        try:
            rows = pq.read_table(self._path, schema=SCHEMA).to_pylist()
        except FileNotFoundError:
            raise InputError(
                f"{self._path} is missing; it belongs to the repository (git checkout {self._path}), and "
                "`python -m fanin.data.wordnet build <folder with data.noun>` makes it anew"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self._path} is broken ({error}); fetch it again (git checkout {self._path})") from None
        return {
            row["id"]: Synset(row["id"], row["lemmas"], row["gloss"], [(p["symbol"], p["target"]) for p in row["pointers"]])
            for row in rows
        }

    def files(self) -> list[Path]:
        return [self._path]

    def train(self) -> Iterator[Document]:
        return self._documents(self._train)

    def test(self) -> Iterator[Document]:
        unseen = Counter(label in self._ids for labels in self._test.values() for label in labels)[False]
        self.facts.counts["test_labels_unseen"] = unseen
        return self._documents(self._test)

    def labels(self) -> Iterator[str]:
        names = {id: ", ".join(self._synsets[id].lemmas) for id in self._ids}
        shared = Counter(names.values())
        for id, name in names.items():
            yield name if shared[name] == 1 else f"{name} ({_shorten(definition(self._synsets[id].gloss))})"

    def filtered(self, documents: int) -> None:
        return None

    def _documents(self, targets: dict[str, set[str]]) -> Iterator[Document]:
        for id, labels in targets.items():
            synset = self._synsets[id]
            text = f"{', '.join(synset.lemmas)}: {definition(synset.gloss)}"
            yield text, sorted(self._ids[label] for label in labels if label in self._ids)


def definition(gloss: str) -> str:
    """A gloss without the quoted examples of use that follow it; quotes within the definition stay."""
    return re.split(r'(?<!e\.g\.)[;:,]\s*"', gloss, maxsplit=1)[0].strip(" ;") or gloss


def _shorten(text: str) -> str:
    if len(text) <= _LABEL_CHARACTERS:
        return text
    return text[:_LABEL_CHARACTERS].rsplit(" ", 1)[0].rstrip(" ,;:(") + "…"


def _is_test(id: str) -> bool:
    """One synset in five, by a hash of its id, so that the split never depends on order or on the task."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") % 5 == 0


def _hypernyms(synsets: dict[str, Synset]) -> dict[str, set[str]]:
    parents = {id: [t for symbol, t in s.pointers if symbol in _HYPERNYMS] for id, s in synsets.items()}
    targets = {}
    for id in synsets:
        above: set[str] = set()
        waiting = list(parents[id])
        while waiting:  # a walk, not a recursion: WordNet's verbs have a cycle
            parent = waiting.pop()
            if parent not in above:
                above.add(parent)
                waiting.extend(parents[parent])
        above.discard(id)
        if above:
            targets[id] = above
    counts = Counter(label for labels in targets.values() for label in labels)
    common = {label for label, count in counts.items() if count > _TOO_COMMON * len(targets)}
    kept = {id: labels - common for id, labels in targets.items()}
    return {id: labels for id, labels in kept.items() if labels}


def _targets(synsets: dict[str, Synset]) -> dict[str, set[str]]:
    targets = {id: {target for _, target in s.pointers} - {id} for id, s in synsets.items()}
    return {id: labels for id, labels in targets.items() if labels}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `python -m fanin.data.wordnet build <folder with data.noun> [--out data/raw/wordnet]`."""
    parser = argparse.ArgumentParser(prog="python -m fanin.data.wordnet", description="Make the bundled raw WordNet.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="parse data.{noun,verb,adj,adv} into one parquet")
    command.add_argument("dictionary", type=Path, help="folder that holds data.noun, data.verb, data.adj, data.adv")
    command.add_argument("--out", type=Path, default=Path("data/raw/wordnet"))
    given = parser.parse_args(arguments)
    try:
        print(f"{build(given.dictionary, given.out)} synsets in {given.out / SYNSETS}")
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
