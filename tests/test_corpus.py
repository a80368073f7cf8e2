"""The corpus stage on good input: what each layout becomes, streaming, and that a failure leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_layouts import (
    LABELS,
    TEST,
    TRAIN,
    config,
    leftovers,
    rows,
    write,
    write_json_layout,
    write_parquet_layout,
    write_raw_layout,
    write_sparse_layout,
)
from fanin.data import corpus as corpus_module
from fanin.data.corpus import build_corpus
from fanin.files import InputError

WRITERS = {
    "xc_json": write_json_layout,
    "xc_json.gz": lambda raw: write_json_layout(raw, packed=True),
    "xc_sparse": write_sparse_layout,
    "xc_sparse.gz": lambda raw: write_sparse_layout(raw, packed=True),
    "xc_sparse/raw": lambda raw: write_sparse_layout(raw, folder="raw"),
    "parquet": write_parquet_layout,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_layouts_with_label_ids_become_the_same_corpus(layout: str, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "corpus"
    WRITERS[layout](raw)
    facts = build_corpus(config(layout.split(".")[0].split("/")[0]), raw, out)
    assert rows(out / "train.parquet") == [(text, sorted(ids)) for text, ids in TRAIN]
    assert rows(out / "test.parquet") == [(text, sorted(ids)) for text, ids in TEST]
    assert rows(out / "labels.parquet") == [(0, "fruit", 2), (1, "size", 1), (2, "apple", 1), (3, "plum", 0)]
    assert rows(out / "filter.parquet") == [(0, 2), (1, 0)]
    counts = {"train_documents": 3, "test_documents": 2, "label_documents": 0, "labels": 4, "labels_seen_once": 2}
    assert counts.items() <= facts.items()
    assert facts["labels_per_document"] == pytest.approx(4 / 3, abs=1e-4)
    assert facts["filtered_pairs"] == 2
    assert facts["test_documents_unlabelled"] == 1
    assert json.loads((out / "corpus.json").read_text()) == facts


def test_schemas_are_those_of_the_contract(tmp_path: Path) -> None:
    write_json_layout(tmp_path / "raw")
    build_corpus(config("xc_json"), tmp_path / "raw", tmp_path / "corpus")
    documents = pq.read_schema(tmp_path / "corpus" / "train.parquet")
    assert documents.names == ["text", "labels"]
    assert documents.field("labels").type.value_type == pa.int32()
    labels = pq.read_schema(tmp_path / "corpus" / "labels.parquet")
    assert [str(field.type) for field in labels] == ["int32", "string", "int32"]
    assert [str(field.type) for field in pq.read_schema(tmp_path / "corpus" / "filter.parquet")] == ["int32", "int32"]


@pytest.mark.parametrize("packed", [False, True])
def test_label_names_are_numbered_as_training_shows_them(packed: bool, tmp_path: Path) -> None:
    write_raw_layout(tmp_path / "raw", packed)
    facts = build_corpus(config("xc_raw"), tmp_path / "raw", tmp_path / "corpus")
    # the first document names apple before fruit; plum is in the test set alone
    assert rows(tmp_path / "corpus" / "labels.parquet") == [(0, "a apple", 1), (1, "a fruit", 2), (2, "a size", 1)]
    assert [ids for _, ids in rows(tmp_path / "corpus" / "train.parquet")] == [[0, 1], [2], [1]]
    assert [ids for _, ids in rows(tmp_path / "corpus" / "test.parquet")] == [[1], []]
    assert facts["test_labels_unseen"] == 1
    assert not (tmp_path / "corpus" / "filter.parquet").exists()


def test_title_and_content_are_joined_and_separators_removed(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_json_layout(raw)
    write(raw / "trn.json", ['{"title": " A ", "content": "b c ", "target_ind": [0]}', '{"content": "d", "target_ind": [1]}'])
    build_corpus(config("xc_json"), raw, tmp_path / "corpus")
    assert [text for text, _ in rows(tmp_path / "corpus" / "train.parquet")] == ["A b c", "d"]
    write_raw_layout(raw)
    write(raw / "train_raw_texts.txt", ["A /SEP/ b", "c", "d"])
    build_corpus(config("xc_raw"), raw, tmp_path / "corpus")
    assert rows(tmp_path / "corpus" / "train.parquet")[0][0].split() == ["A", "b"]


def test_plain_label_file_beside_json(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_json_layout(raw)
    (raw / "lbl.json").unlink()
    write(raw / "Y.txt", LABELS)
    build_corpus(config("xc_json"), raw, tmp_path / "corpus")
    assert [text for _, text, _ in rows(tmp_path / "corpus" / "labels.parquet")] == LABELS


@pytest.mark.parametrize("layout", ["xc_json", "xc_sparse", "parquet"])
def test_label_documents_follow_the_training_documents_and_count_apart(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path / "raw")
    facts = build_corpus(config(layout, label_documents=True), tmp_path / "raw", tmp_path / "corpus")
    assert rows(tmp_path / "corpus" / "train.parquet")[3:] == [(text, [label]) for label, text in enumerate(LABELS)]
    assert [frequency for *_, frequency in rows(tmp_path / "corpus" / "labels.parquet")] == [2, 1, 1, 0]
    assert (facts["train_documents"], facts["label_documents"]) == (3, 4)
    assert facts["labels_per_document"] == pytest.approx(4 / 3, abs=1e-4)


def test_row_groups_do_not_change_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json_layout(tmp_path / "raw")
    whole = build_corpus(config("xc_json", True), tmp_path / "raw", tmp_path / "whole")
    monkeypatch.setattr(corpus_module, "ROW_GROUP", 2)
    pieces = build_corpus(config("xc_json", True), tmp_path / "raw", tmp_path / "pieces")
    assert pq.read_metadata(tmp_path / "pieces" / "train.parquet").num_row_groups == 4  # 2 + 1 documents, 2 + 2 labels
    for name in ("train", "test", "labels", "filter"):
        assert pq.read_table(tmp_path / "whole" / f"{name}.parquet") == pq.read_table(tmp_path / "pieces" / f"{name}.parquet")
    assert whole == pieces


def test_checksum_follows_the_raw_bytes(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_json_layout(raw)
    (raw / "filter_labels_test.txt").unlink()
    first = build_corpus(config("xc_json"), raw, tmp_path / "corpus")["checksum"]
    by_hand = hashlib.sha256()
    for name in ("trn.json", "tst.json", "lbl.json"):
        data = (raw / name).read_bytes()
        by_hand.update(f"{name}\n{len(data)}\n".encode() + data)
    assert first == by_hand.hexdigest()
    assert build_corpus(config("xc_json"), raw, tmp_path / "corpus")["checksum"] == first
    write(raw / "lbl.json", [json.dumps({"title": f"{text}!"}) for text in LABELS])
    assert build_corpus(config("xc_json"), raw, tmp_path / "corpus")["checksum"] != first


def test_failure_keeps_the_old_corpus_whole(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "corpus"
    write_json_layout(raw)
    build_corpus(config("xc_json"), raw, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write(raw / "tst.json", ['{"title": "x", "target_ind": [9]}'])
    with pytest.raises(InputError, match=r"tst\.json:1: label id 9 is out of range"):
        build_corpus(config("xc_json"), raw, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert leftovers(tmp_path) == ["corpus", "raw"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["train", "labels", "test", "filter"])
def test_full_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself says ENOSPC: the file of that name is written to /dev/full."""
    write_json_layout(tmp_path / "raw")
    real = pq.ParquetWriter
    full = f"{name}.parquet"
    monkeypatch.setattr(
        corpus_module.pq, "ParquetWriter", lambda path, *a, **k: real("/dev/full" if path.name == full else path, *a, **k)
    )
    with pytest.raises(InputError, match=r"cannot write .*corpus.*disk is full"):
        build_corpus(config("xc_json"), tmp_path / "raw", tmp_path / "corpus")
    assert leftovers(tmp_path) == ["raw"]


def test_read_only_folder(tmp_path: Path) -> None:
    """In a process that has given up root's right to write anywhere."""
    write_json_layout(tmp_path / "raw")
    place = tmp_path / "place"
    place.mkdir()
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    place.chmod(0o555)
    program = f"""
import os, sys
from pathlib import Path
from fanin.config import Config
from fanin.data.corpus import build_corpus
from fanin.files import InputError
os.chdir({str(tmp_path)!r})
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
config = Config(preset="mine")
config.corpus.format = "xc_json"
try:
    build_corpus(config, Path("raw"), Path("place/corpus"))
except InputError as error:
    sys.exit(f"error: {{error}}")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    )
    assert result.returncode == 1
    assert (
        result.stderr == "error: cannot write place/corpus: permission denied; make the folder writable or choose another one\n"
    )
    assert leftovers(place) == []


def test_stage_reports_missing_files_with_their_origin(tmp_path: Path) -> None:
    raw = tmp_path / "amazon-3m"
    raw.mkdir()
    (raw / "README.md").write_text("which files go here")
    (raw / "train_labels.txt").write_text("a b\n")
    with pytest.raises(InputError) as caught:
        build_corpus(config("xc_raw"), raw, tmp_path / "corpus")
    message = str(caught.value)
    assert message.startswith(f"{raw}: train_raw_texts.txt, test_raw_texts.txt, test_labels.txt missing")
    assert "manikvarma.org/downloads/XC/XMLRepository.html" in message
    assert str(raw / "README.md") in message
    assert leftovers(tmp_path) == ["amazon-3m"]


def test_stage_exits_with_one_line_and_code_1(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    params = (root / "params.yaml").read_text().replace("preset: wordnet", "preset: amazon-670k", 1)
    (tmp_path / "params.yaml").write_text(params)
    (tmp_path / "presets").symlink_to(root / "presets")
    command = [sys.executable, root / "pipeline" / "corpus.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, FANIN_TRACKING="off"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: data/raw/amazon-670k: train_raw_texts.txt, ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_streaming_benchmark_checks_and_records(tmp_path: Path) -> None:
    """The benchmark at a small size: its own comparison passes, and the peak is far from what holding all would take."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "corpus_streaming.py"
    peaks = {}
    for documents in (60_000, 120_000):
        sizes = ["--documents", str(documents), "--labels", "5000", "--out", str(tmp_path / str(documents))]
        subprocess.run([sys.executable, script, *sizes], check=True, capture_output=True)
        (record,) = (tmp_path / str(documents)).glob("*.json")
        peaks[documents] = json.loads(record.read_text())["peak_mib"]
    # 60,000 more documents are 33 MiB of text and 55 MiB of Python objects when they are kept
    assert peaks[120_000] < peaks[60_000] + 40, peaks
