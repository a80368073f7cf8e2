"""A rival's process: it learns a task that can be learnt, its record is whole, a missing package is told as such."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanin.files import InputError, write_json
from study import rival
from study.corpora import Corpus
from study.methods import RIVALS, Method
from study.records import DATA

ROOT = Path(__file__).resolve().parents[1]
needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is the rivals' own")
LABELS = 8


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Documents whose words name their labels."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    made = Corpus("made", "Made", {"preset": "wordnet", "evaluate.bootstrap": 5})
    folder = made.folder / "corpus"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for side, documents in (("train", 240), ("test", 60)):
        owned = [sorted(rng.choice(LABELS, 2, replace=False).tolist()) for _ in range(documents)]
        texts = [" ".join([*(f"word{label} other{label}" for label in own), f"noise{rng.integers(50)}"]) for own in owned]
        pq.write_table(pa.table({"text": texts, "labels": pa.array(owned, pa.list_(pa.int32()))}), folder / f"{side}.parquet")
    labels = {"id": pa.array(range(LABELS), pa.int32()), "text": [f"l{i}" for i in range(LABELS)]}
    pq.write_table(pa.table(labels | {"frequency": pa.array([60] * LABELS, pa.int32())}), folder / "labels.parquet")
    write_json(folder / "corpus.json", {"train_documents": 240})
    monkeypatch.setattr(rival, "prepare", lambda corpus: dict.fromkeys(DATA, 1))
    monkeypatch.setattr(rival, "SCRIPT", ROOT / "study/rivals/run.py")
    monkeypatch.setattr(rival, "PYTHON", Path(sys.executable))
    return made


@needs_sklearn
def test_nearest_neighbours_find_the_labels_that_the_words_name(corpus: Corpus) -> None:
    record = rival.run(Method("tfidf_knn", "neighbours", "rival"), corpus, 1)
    assert record["P@1"] == 100
    assert record["model_mib"] > 0
    assert record["peak_mib"] > 10
    assert record["settings"]["tfidf"]["ngram_range"] == [1, 2]
    assert record["rival_versions"]["scikit-learn"]
    assert {"head", "torso", "tail", "train_seconds", "train_cpu_seconds", "commit", "device", "data"} <= set(record)


@needs_sklearn
@pytest.mark.skipif(importlib.util.find_spec("omikuji") is not None, reason="omikuji is installed here")
def test_a_package_that_is_not_there_is_told_as_such(corpus: Corpus) -> None:
    with pytest.raises(rival.Unavailable, match="omikuji cannot be imported"):
        rival.run(Method("bonsai", "Bonsai", "rival"), corpus, 1)


def test_an_environment_that_is_not_there_names_the_command(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival, "PYTHON", Path("nowhere/python"))
    with pytest.raises(rival.Unavailable, match="run `make rivals`"):
        rival.run(Method("bonsai", "Bonsai", "rival"), corpus, 1)


@needs_sklearn
def test_a_rival_that_fails_leaves_its_log(corpus: Corpus) -> None:
    (corpus.folder / "corpus" / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"exit code 1; its output is in \.study/made/rivals/tfidf_knn/log\.txt"):
        rival.run(Method("tfidf_knn", "neighbours", "rival"), corpus, 1)
    assert "Parquet" in (corpus.folder / "rivals/tfidf_knn/log.txt").read_text()


def test_every_rival_of_the_table_is_one_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("rivals_run", ROOT / "study/rivals/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rivals_run", module)
    spec.loader.exec_module(module)
    assert list(module.RIVALS) == list(RIVALS)
    ranked = module._best(module.sparse.csr_matrix([[0.1, 0.0, 0.9], [0.0, 0.0, 0.0]]))
    assert ranked[0, :3].tolist() == [2, 0, -1]
    assert (ranked[1] == -1).all()
    x, y = module.sparse.csr_matrix([[0.5, 0.0], [0.0, 0.0], [0.0, 1.0]]), module.sparse.csr_matrix([[1, 1], [1, 0], [0, 1]])
    module._write_repository_format(module.Data(x, y, x), tmp_path / "train.txt")
    assert (tmp_path / "train.txt").read_text() == "2 2 2\n0,1 0:0.5\n1 1:1\n"  # the document of no feature is left out
