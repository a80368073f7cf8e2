"""The study's own copy of a corpus: made when something changed, named by its documents."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from study import corpora
from study.corpora import Corpus, documents, prepare, stage_code

ROOT = Path(__file__).resolve().parents[1]
MINE = Corpus("mine", "Mine", {"preset": "mine"})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose one preset reads own parquet."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/mine.yaml").write_text("corpus: {format: parquet}\n")
    (tmp_path / "code.py").write_text("one")
    (tmp_path / "dvc.yaml").write_text("stages:\n  corpus:\n    deps: [code.py, data]\n")
    write(tmp_path, "a text")
    return tmp_path


def write(project: Path, text: str) -> None:
    raw = project / "data/raw/mine"
    raw.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": [text, "another"], "labels": pa.array([[0], [0, 1]], pa.list_(pa.int32()))})
    for side in ("train", "test"):
        pq.write_table(table, raw / f"{side}.parquet")
    pq.write_table(pa.table({"id": pa.array([0, 1], pa.int32()), "text": ["x", "y"]}), raw / "labels.parquet")


def test_it_is_made_once_and_again_when_files_or_code_change(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = corpora.build_corpus
    monkeypatch.setattr(corpora, "build_corpus", lambda *arguments: (made.append(1), real(*arguments))[1])
    assert prepare(MINE)["labels"] == 2
    first = documents(MINE)
    assert len(made) == 1
    (project / "code.py").write_text("two")  # the code changed, what it makes did not: rivals need not run again
    assert documents(MINE) == first
    assert len(made) == 2
    write(project, "other text")
    assert documents(MINE) != first
    assert len(made) == 3
    assert pq.read_table(MINE.folder / "corpus/train.parquet")["text"].to_pylist() == ["other text", "another"]


def test_the_code_of_a_stage_is_what_dvc_lists(project: Path) -> None:
    before = stage_code("corpus")
    (project / "other.py").write_text("not a dep")
    assert stage_code("corpus") == before
    (project / "code.py").write_text("changed")
    assert stage_code("corpus") != before


def test_raw_files_that_git_ignores_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("/raw/*\n!/raw/README.md\n")
    (tmp_path / "raw").mkdir()
    for name in ("README.md", "big.txt"):
        (tmp_path / "raw" / name).write_text("x")
    assert Corpus("a", "A", raw=("raw",)).ignored_files() == ["raw/big.txt"]
    assert Corpus("b", "B").ignored_files() == []
