"""Corpora of study/unseen.py from small copies of what they are made of."""

from __future__ import annotations

import gzip
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fanin.config import load_config
from fanin.data.corpus import build_corpus
from study import unseen

ROOT = Path(__file__).resolve().parents[1]
DICTIONARY = """00-database-info

   This file links to {nothing}.

16550
NS16550

   <hardware, chip> A {UART} with a
   {First-In
   First-Out} buffer.

   (1995-01-24)

First-In First-Out
FIFO

   <algorithm> A queue; see {buffer}, {16550}.

UART

   <hardware> A chip like the {ns16550} and the {uart}.
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages/usr/share"
    folder.mkdir(parents=True)
    with gzip.open(folder / unseen.FOLDOC, "wt") as file:
        file.write(DICTIONARY)
    with closing(sqlite3.connect(folder / unseen.GO)) as go, go:
        go.execute("CREATE TABLE go_term (_id, go_id, term, definition)")
        protein = (3, "GO:3", "protein binding", "To bind a protein.")
        terms = [(1, "GO:1", "all", None), (2, "GO:2", "binding", "To bind."), protein]
        go.executemany("INSERT INTO go_term VALUES (?, ?, ?, ?)", terms)
        for aspect in ("bp", "mf", "cc"):
            go.execute(f"CREATE TABLE go_{aspect}_offspring (_id, _offspring_id)")
        go.executemany("INSERT INTO go_mf_offspring VALUES (?, ?)", [(1, 2), (1, 3), (2, 3), (9, 3)])
    with closing(sqlite3.connect(folder / unseen.GENES)) as genes, genes:
        genes.execute("CREATE TABLE gene_info (_id, gene_name, symbol)")
        names = [(1, "globulin", "A"), (2, "albumin", "B"), (3, "unknown", "C")]
        genes.executemany("INSERT INTO gene_info VALUES (?, ?, ?)", names)
        for aspect in ("bp", "mf", "cc"):
            genes.execute(f"CREATE TABLE go_{aspect} (_id, go_id, evidence)")
        rows = [(1, "GO:3", "IDA"), (2, "GO:3", "IEA"), (2, "GO:2", "IEA"), (3, "GO:2", "ND"), (1, "GO:7", "IDA")]
        genes.executemany("INSERT INTO go_mf VALUES (?, ?, ?)", rows)
    return tmp_path / "packages"


def labelled(raw: unseen.Raw) -> dict[str, set[str]]:
    return {item.text: {raw.label_text(label) for label in item.labels} for item in raw.items}


def test_terms_have_their_ancestors_and_genes_what_is_known_of_them(packages: Path) -> None:
    assert labelled(unseen.go(packages)) == {
        "all. ": set(),
        "binding. To bind.": {"all"},
        "protein binding. To bind a protein.": {"all", "binding"},
    }
    assert labelled(unseen.genes(packages)) == {
        "A: globulin": {"protein binding"},
        "B: albumin": {"protein binding", "binding"},
        "C: unknown": set(),
    }


def test_entries_have_the_entries_that_they_link_to(packages: Path) -> None:
    assert labelled(unseen.foldoc(packages)) == {
        "16550.  A UART with a First-In First-Out buffer. (1995-01-24)": {"UART", "First-In First-Out"},
        "First-In First-Out.  A queue; see buffer, 16550.": {"16550"},
        "UART.  A chip like the ns16550 and the uart.": {"16550"},
    }


def test_what_is_written_is_a_corpus_of_the_project(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    items = [unseen.Item(f"text {n}", frozenset({"every", f"of two {n // 2}", f"of one {n}"})) for n in range(40)]
    monkeypatch.setitem(unseen.CORPORA, "foldoc", lambda _: unseen.Raw(items, str, {"tokens": {"max_length": 128}}))
    assert unseen.main([str(packages), "foldoc"]) == 0
    params = (tmp_path / "params.yaml").read_text().replace("preset: wordnet", "preset: foldoc")
    (tmp_path / "params.yaml").write_text(params)
    config = load_config("params.yaml")
    assert (config.corpus.format, config.tokens.max_length, config.head.fan_in) == ("parquet", 128, 30)
    facts = build_corpus(config, config.raw_folder, tmp_path / "corpus")
    assert facts["labels"] == 21  # `every` and twenty of two documents each
    texts = {side: pq.read_table(tmp_path / "corpus" / f"{side}.parquet")["text"].to_pylist() for side in ("train", "test")}
    assert sorted(texts["train"] + texts["test"]) == sorted(item.text for item in items)
    assert 0 < len(texts["test"]) < 20


def test_what_is_missing_is_named(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert unseen.main([str(tmp_path / "none"), "go"]) == 1
    assert "no GO.sqlite below it; unpack the packages" in capsys.readouterr().err
    assert unseen.main([str(packages), "gone"]) == 1
    assert "gone: no such corpus; there are go, genes, foldoc" in capsys.readouterr().err
