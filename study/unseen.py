"""Corpora that no setting was chosen on, to see what the defaults are worth on them.

    apt-get download r-bioc-go.db r-bioc-org.hs.eg.db dict-foldoc
    for package in *.deb; do dpkg-deb -x $package packages; done
    python -m study.unseen packages          # data/raw/{go,genes,foldoc} and presets/{go,genes,foldoc}.yaml
    make compare CORPUS=genes METHODS="sparse_exchanged dense_all bonsai" SEEDS=1

Unlike the study's own corpora they keep frequent labels, one of which may stand at most documents, as many collections do:

- go: a term of the Gene Ontology, its name and definition, to all terms above it;
- genes: a human gene's symbol and name to the terms of the Gene Ontology that it is annotated with;
- foldoc: an entry of the Free On-line Dictionary of Computing to the entries that it links to.

A preset is WordNet's, but for where the documents come from: the defaults that a user's own data meets. What is made belongs to
no repository: the data have licences of their own.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fanin.files import InputError, atomic_path

GO, GENES, FOLDOC = "GO.sqlite", "org.Hs.eg.sqlite", "foldoc.dict.dz"
_ASPECTS = ("bp", "mf", "cc")  # of the Gene Ontology: each has tables of its own


class Item(NamedTuple):
    """A document before labels have numbers."""

    text: str
    labels: frozenset[Any]


class Raw(NamedTuple):
    """Documents, the text of a label, and the preset's settings over WordNet's."""

    items: list[Item]
    label_text: Callable[[Any], str]
    settings: dict[str, dict[str, int]]


def go(packages: Path) -> Raw:
    """Terms to their ancestors."""
    with closing(_database(packages, GO)) as database:
        terms = {term: (name, text or "") for term, name, text in database.execute("SELECT _id, term, definition FROM go_term")}
        above: defaultdict[int, set[Any]] = defaultdict(set)
        for aspect in _ASPECTS:
            for ancestor, term in database.execute(f"SELECT _id, _offspring_id FROM go_{aspect}_offspring"):
                if ancestor in terms:
                    above[term].add(ancestor)
    items = [Item(f"{name}. {text}", frozenset(above[term])) for term, (name, text) in terms.items()]
    return Raw(items, lambda term: terms[term][0], {})


def genes(packages: Path) -> Raw:
    """Genes to their annotations."""
    with closing(_database(packages, GO)) as database:
        names = dict(database.execute("SELECT go_id, term FROM go_term"))
    annotations: defaultdict[int, set[Any]] = defaultdict(set)
    with closing(_database(packages, GENES)) as database:
        texts = {
            gene: f"{symbol}: {name}" for gene, name, symbol in database.execute("SELECT _id, gene_name, symbol FROM gene_info")
        }
        for aspect in _ASPECTS:
            for gene, term, evidence in database.execute(f"SELECT _id, go_id, evidence FROM go_{aspect}"):
                if evidence != "ND" and term in names:  # "no data": nothing is known
                    annotations[gene].add(term)
    items = [Item(text, frozenset(annotations[gene])) for gene, text in texts.items()]
    return Raw(items, lambda term: names[term], {})


def foldoc(packages: Path) -> Raw:
    """Entries to the entries that their text links to; `{this}` is a link."""
    path = _find(packages, FOLDOC)
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        entries = list(_entries(file))
    place: dict[str, int] = {}
    for number, (heads, _) in enumerate(entries):
        for head in heads:
            place.setdefault(head.lower(), number)
    items = []
    for number, (heads, text) in enumerate(entries):
        if heads[0].startswith("00-database"):
            continue
        links = (re.sub(r"\s+", " ", link).lower() for link in re.findall(r"\{([^{}]+)\}", text))
        labels = frozenset(place[link] for link in links if link in place) - {number}
        plain = re.sub(r"<[a-z, ]+>", "", text, count=1).replace("{", "").replace("}", "")  # the first: its subjects
        items.append(Item(f"{heads[0]}. {plain}", labels))
    return Raw(items, lambda number: entries[number][0][0], {"tokens": {"max_length": 128}})


CORPORA: dict[str, Callable[[Path], Raw]] = {"go": go, "genes": genes, "foldoc": foldoc}


def _entries(lines: Iterable[str]) -> Iterator[tuple[list[str], str]]:
    """(headwords, text) of a dictionary whose headwords begin at the margin and whose text is indented."""
    heads: list[str] = []
    body: list[str] = []
    for line in lines:
        if line.strip() and line[0] != " ":
            if body:
                yield heads, " ".join(body)
                heads, body = [], []
            heads.append(line.strip())
        elif line.strip() and heads:
            body.append(line.strip())
    if body:
        yield heads, " ".join(body)


def _find(packages: Path, name: str) -> Path:
    found = sorted(packages.rglob(name))
    if not found:
        raise InputError(f"{packages}: no {name} below it; unpack the packages there that study/unseen.py names")
    return found[0]


def _database(packages: Path, name: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{_find(packages, name)}?mode=ro", uri=True)


def write(raw: Raw, folder: Path) -> dict[str, int]:
    """The parquet files of the format `parquet` in `folder`; returns counts.

    Labels are those of two documents or more; one document in five, by a hash of its text, is for testing.
    """
    items = [item for item in raw.items if item.labels and item.text.strip()]
    counts = Counter(label for item in items for label in item.labels)
    labels = sorted(label for label, count in counts.items() if count > 1)
    ids = {label: number for number, label in enumerate(labels)}
    sides: dict[str, list[tuple[str, list[int]]]] = {"train": [], "test": []}
    for item in items:
        own = sorted(ids[label] for label in item.labels if label in ids)
        if own:
            sides["test" if int(hashlib.md5(item.text.encode()).hexdigest(), 16) % 5 == 0 else "train"].append((item.text, own))
    with atomic_path(folder, directory=True) as out:
        for side, documents in sides.items():
            texts = pa.array([text for text, _ in documents], pa.string())
            table = pa.table({"text": texts, "labels": pa.array([own for _, own in documents], pa.list_(pa.int32()))})
            pq.write_table(table, out / f"{side}.parquet")
        names = [raw.label_text(label) for label in labels]
        pq.write_table(pa.table({"id": pa.array(range(len(labels)), pa.int32()), "text": names}), out / "labels.parquet")
    return {side: len(documents) for side, documents in sides.items()} | {"labels": len(labels)}


def preset(settings: dict[str, dict[str, int]]) -> str:
    """WordNet's preset for documents in parquet."""
    values = yaml.safe_load(Path("presets/wordnet.yaml").read_text(encoding="utf-8"))
    values["corpus"] = {"format": "parquet"}
    for section, own in settings.items():
        values[section] |= own
    return "# presets/wordnet.yaml, for a corpus of study/unseen.py.\n" + yaml.safe_dump(values, sort_keys=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the corpora named from the packages in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder that holds the unpacked packages")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CORPORA)}; all by default")
    options = parser.parse_args(arguments)
    try:
        for name in options.names or CORPORA:
            if name not in CORPORA:
                raise InputError(f"{name}: no such corpus; there are {', '.join(CORPORA)}")
            raw = CORPORA[name](options.packages)
            found = write(raw, Path("data/raw") / name)
            with atomic_path(Path("presets") / f"{name}.yaml") as path:
                path.write_text(preset(raw.settings), encoding="utf-8")
            print(f"{name}: {found['train']} training and {found['test']} test documents, {found['labels']} labels")
    except (InputError, OSError, sqlite3.DatabaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
