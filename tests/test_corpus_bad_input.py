"""Every kind of bad raw input: an error that names file and line, what was found, what to do; and nothing left behind."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_layouts import (
    config,
    leftovers,
    write,
    write_json_layout,
    write_parquet_layout,
    write_raw_layout,
    write_sparse_layout,
)
from fanin.data.corpus import build_corpus
from fanin.files import InputError

Break = Callable[[Path], object]


def line(name: str, number: int, text: str | bytes) -> Break:
    """Put `text` in the place of a line (from 1)."""

    def change(raw: Path) -> None:
        lines = (raw / name).read_bytes().splitlines()
        lines[number - 1] = text.encode() if isinstance(text, str) else text
        (raw / name).write_bytes(b"\n".join(lines) + b"\n")

    return change


def document(**values: object) -> str:
    return json.dumps({"title": "a text", "target_ind": [0], **values})


def remove(name: str) -> Break:
    return lambda raw: (raw / name).unlink()


def empty(name: str) -> Break:
    return lambda raw: (raw / name).write_bytes(b"")


def truncate_gzip(name: str) -> Break:
    def change(raw: Path) -> None:
        data = gzip.compress((raw / name).read_bytes())
        (raw / name).unlink()
        (raw / f"{name}.gz").write_bytes(data[:-12])

    return change


def damage_gzip(name: str) -> Break:
    def change(raw: Path) -> None:
        data = bytearray(gzip.compress((raw / name).read_bytes()))
        data[-8] ^= 0xFF  # of the check sum
        (raw / name).write_bytes(data)

    return change


def add(name: str, text: str) -> Break:
    return lambda raw: (raw / name).write_text((raw / name).read_text() + text + "\n")


JSON: list[tuple[str, Break, str]] = [
    ("missing file", remove("tst.json"), r"raw: tst\.json missing.*trn\.json, tst\.json, lbl\.json there"),
    ("missing folder", lambda raw: shutil.rmtree(raw), r"trn\.json, tst\.json, lbl\.json missing"),
    ("empty file", empty("trn.json"), r"trn\.json:1: the file is empty; fetch it again"),
    ("empty test file", empty("tst.json"), r"tst\.json:1: the file is empty"),
    ("empty label file", empty("lbl.json"), r"lbl\.json:1: the file is empty"),
    ("empty filter file", empty("filter_labels_test.txt"), r"filter_labels_test\.txt:1: the file is empty.*optional"),
    ("truncated gzip", truncate_gzip("trn.json"), r"trn\.json\.gz:\d+: .*truncated or damaged.*fetch it again"),
    ("truncated labels", truncate_gzip("lbl.json"), r"lbl\.json\.gz:\d+: .*truncated or damaged"),
    ("damaged gzip", damage_gzip("trn.json"), r"trn\.json:\d+: .*truncated or damaged \(CRC check failed"),
    ("both plain and gzip", lambda raw: (raw / "trn.json.gz").write_bytes(b"x"), r"trn\.json and trn\.json\.gz hold the same"),
    ("not JSON", line("trn.json", 2, "{'title': 1}"), r"trn\.json:2: not valid JSON \(.* at position 2\)"),
    ("blank line", line("trn.json", 2, ""), r"trn\.json:2: not valid JSON"),
    ("nested too deep", line("trn.json", 2, "[" * 100_000), r"trn\.json:2: not valid JSON \(nested too deep\)"),
    ("no object", line("trn.json", 1, "[1]"), r"trn\.json:1: expected a JSON object a line, found \[1\]"),
    ("no text key", line("trn.json", 3, '{"uid": "u", "target_ind": [0]}'), r"trn\.json:3: neither `title` nor `content`"),
    ("no labels key", line("trn.json", 3, '{"title": "x"}'), r"trn\.json:3: `target_ind` must be a list.*keys are \['title'\]"),
    ("no labels key in test", line("tst.json", 1, '{"title": "x"}'), r"tst\.json:1: `target_ind` must be a list"),
    ("labels not a list", line("trn.json", 1, document(target_ind=3)), r"trn\.json:1: `target_ind` must be a list.*found 3"),
    ("title not a string", line("trn.json", 1, document(title=5)), r"trn\.json:1: `title` must be a string, found 5"),
    (
        "id out of range",
        line("trn.json", 2, document(target_ind=[0, 4])),
        r"trn\.json:2: label id 4 is out of range; there are 4",
    ),
    ("huge id", line("trn.json", 2, document(target_ind=[2**70])), r"trn\.json:2: label id 1180591620717411303424 is out of"),
    ("negative id", line("trn.json", 2, document(target_ind=[0, -1])), r"trn\.json:2: label id -1 is negative"),
    ("repeated id", line("trn.json", 2, document(target_ind=[1, 0, 1])), r"trn\.json:2: label id 1 is repeated"),
    ("id as text", line("trn.json", 2, document(target_ind=["1"])), r"trn\.json:2: label id '1' is not a whole number"),
    ("fractional id", line("trn.json", 2, document(target_ind=[1.0])), r"trn\.json:2: label id 1\.0 is not a whole number"),
    ("boolean id", line("trn.json", 2, document(target_ind=[True])), r"trn\.json:2: label id True is not a whole number"),
    ("NaN id", line("trn.json", 2, '{"title": "x", "target_ind": [NaN]}'), r"trn\.json:2: label id nan is not a whole number"),
    ("NaN relevance", line("trn.json", 2, document(target_rel=[float("nan")])), r"trn\.json:2: `target_rel` holds nan"),
    ("short relevance", line("trn.json", 2, document(target_rel=[])), r"trn\.json:2: `target_rel` must be a list as long as"),
    ("no label", line("trn.json", 2, document(target_ind=[])), r"trn\.json:2: a training document without labels; give it"),
    ("empty text", line("trn.json", 2, document(title=" \t")), r"trn\.json:2: the text is empty"),
    ("empty test text", line("tst.json", 2, document(title="")), r"tst\.json:2: the text is empty"),
    ("empty label text", line("lbl.json", 2, '{"title": ""}'), r"lbl\.json:2: the text is empty"),
    (
        "broken UTF-8",
        line("trn.json", 2, b'{"title": "caf\xe9", "target_ind": [0]}'),
        r"trn\.json:2: not UTF-8 \(byte 0xe9 at.* 15\)",
    ),
    ("half a surrogate", line("trn.json", 2, document(title="x\ud800")), r"trn\.json:2: '\\ud800' is not a character"),
    ("one label", lambda raw: _one_label(raw), r"raw: the corpus has 1 label; a classifier needs at least 2"),
    (
        "filter: word",
        line("filter_labels_test.txt", 2, "x 1"),
        r"filter_labels_test\.txt:2: the row must be a whole number, found 'x'",
    ),
    ("filter: NaN", line("filter_labels_test.txt", 2, "1 nan"), r"filter_labels_test\.txt:2: the label id must be a whole"),
    (
        "filter: three",
        line("filter_labels_test.txt", 1, "1 1 1"),
        r"filter_labels_test\.txt:1: expected `row label`, found '1 1 1'",
    ),
    (
        "filter: row",
        line("filter_labels_test.txt", 1, "2 1"),
        r"filter_labels_test\.txt:1: row 2 is out of range; there are 2 test",
    ),
    ("filter: label", line("filter_labels_test.txt", 1, "1 4"), r"filter_labels_test\.txt:1: label id 4 is out of range"),
]


def _one_label(raw: Path) -> None:
    write(raw / "lbl.json", ['{"title": "fruit"}'])
    for name in ("trn.json", "tst.json"):
        write(raw / name, [document()])
    (raw / "filter_labels_test.txt").unlink()


SPARSE: list[tuple[str, Break, str]] = [
    ("missing", remove("trn_X_Y.txt"), r"raw: trn_X_Y\.txt missing"),
    ("no header", line("trn_X_Y.txt", 1, "0:1.0"), r"trn_X_Y\.txt:1: expected the header `rows columns`, found '0:1\.0'"),
    ("header not a number", line("trn_X_Y.txt", 1, "3 nan"), r"trn_X_Y\.txt:1: a count in the header must be a whole number"),
    ("header: too few rows", line("trn_X_Y.txt", 1, "2 4"), r"trn_X_Y\.txt:4: the header says 2 rows, but here is one more"),
    (
        "header: too many rows",
        line("trn_X_Y.txt", 1, "5 4"),
        r"trn_X_Y\.txt:4: the header says 5 rows, but the file ends after 3",
    ),
    ("header: columns", line("tst_X_Y.txt", 1, "2 9"), r"tst_X_Y\.txt:1: the header says 9 labels, but the label file has 4"),
    ("more texts", add("trn_X.txt", "extra"), r"trn_X\.txt:4: a text without a line of labels, \S+trn_X_Y\.txt ends before it"),
    (
        "fewer texts",
        lambda raw: write(raw / "trn_X.txt", ["a", "b"]),
        r"trn_X_Y\.txt:4: labels without a text, \S+trn_X\.txt ends",
    ),
    ("NaN", line("trn_X_Y.txt", 3, "1:nan"), r"trn_X_Y\.txt:3: expected `label:value` with a value above 0, found '1:nan'"),
    ("infinite", line("trn_X_Y.txt", 3, "1:inf"), r"trn_X_Y\.txt:3: expected `label:value`"),
    ("zero", line("trn_X_Y.txt", 3, "1:0"), r"trn_X_Y\.txt:3: expected `label:value`"),
    ("no value", line("trn_X_Y.txt", 3, "1"), r"trn_X_Y\.txt:3: expected `label:value`"),
    ("not a number", line("trn_X_Y.txt", 3, "one:1.0"), r"trn_X_Y\.txt:3: a label id must be a whole number, found 'one'"),
    ("fraction", line("trn_X_Y.txt", 3, "1.5:1.0"), r"trn_X_Y\.txt:3: a label id must be a whole number, found '1\.5'"),
    ("out of range", line("trn_X_Y.txt", 3, "4:1.0"), r"trn_X_Y\.txt:3: label id 4 is out of range"),
    ("negative", line("trn_X_Y.txt", 3, "-1:1.0"), r"trn_X_Y\.txt:3: label id -1 is negative"),
    ("repeated", line("trn_X_Y.txt", 3, "1:1.0 1:1.0"), r"trn_X_Y\.txt:3: label id 1 is repeated"),
    ("no label", line("trn_X_Y.txt", 3, ""), r"trn_X_Y\.txt:3: a training document without labels"),
    ("empty text", line("tst_X.txt", 2, "  "), r"tst_X\.txt:2: the text is empty"),
    ("empty label text", line("Y.txt", 2, ""), r"Y\.txt:2: the text is empty"),
    ("broken UTF-8", line("Y.txt", 3, b"caf\xe9 au lait"), r"Y\.txt:3: not UTF-8 \(byte 0xe9 at position 4\).*iconv"),
    ("truncated gzip", truncate_gzip("trn_X_Y.txt"), r"trn_X_Y\.txt\.gz:\d+: .*truncated or damaged"),
]

RAW: list[tuple[str, Break, str]] = [
    ("missing", remove("test_labels.txt"), r"raw: test_labels\.txt missing"),
    ("empty", empty("test_labels.txt"), r"test_labels\.txt:1: the file is empty"),
    ("more texts", add("train_raw_texts.txt", "x"), r"train_raw_texts\.txt:4: a text without a line of labels"),
    ("more labels", add("train_labels.txt", "x"), r"train_labels\.txt:4: labels without a text"),
    ("no label", line("train_labels.txt", 2, " "), r"train_labels\.txt:2: a training document without labels"),
    ("repeated", line("train_labels.txt", 2, "a_b c a_b"), r"train_labels\.txt:2: label 'a_b' is repeated"),
    ("empty text", line("test_raw_texts.txt", 1, " /SEP/ "), r"test_raw_texts\.txt:1: the text is empty"),
    ("broken UTF-8", line("train_labels.txt", 2, b"\xff"), r"train_labels\.txt:2: not UTF-8 \(byte 0xff at position 1\)"),
    (
        "one label",
        lambda raw: write(raw / "train_labels.txt", ["a"] * 3),
        r"the corpus has 1 label; a classifier needs at least 2",
    ),
]


def table(name: str, **columns: pa.Array) -> Break:
    return lambda raw: pq.write_table(pa.table(columns), raw / f"{name}.parquet")


TEXTS = pa.array(["a", "b"])
IDS = pa.array([[0], [1]], pa.list_(pa.int32()))
BROKEN_TEXT = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")]
)
PARQUET: list[tuple[str, Break, str]] = [
    ("missing", remove("labels.parquet"), r"raw: labels\.parquet missing; the format parquet needs"),
    ("not parquet", empty("train.parquet"), r"train\.parquet is not a readable parquet file"),
    (
        "truncated",
        lambda raw: (raw / "test.parquet").write_bytes((raw / "test.parquet").read_bytes()[:-9]),
        r"test\.parquet is not a",
    ),
    ("no rows", table("train", text=TEXTS[:0], labels=IDS[:0]), r"train\.parquet holds no rows"),
    ("no column", table("train", text=TEXTS), r"train\.parquet: column `labels` must be a list of integers, found none"),
    (
        "text of numbers",
        table("train", text=pa.array([1, 2]), labels=IDS),
        r"train\.parquet: column `text` must be a string, found int64",
    ),
    (
        "floats, which may be NaN",
        table("train", text=TEXTS, labels=pa.array([[0.0], [float("nan")]])),
        r"`labels` must be a list of",
    ),
    ("null text", table("train", text=pa.array(["a", None]), labels=IDS), r"train\.parquet:row 1: `text` is null"),
    (
        "null labels",
        table("train", text=TEXTS, labels=pa.array([[0], None], IDS.type)),
        r"train\.parquet:row 1: `labels` is null",
    ),
    (
        "null id",
        table("train", text=TEXTS, labels=pa.array([[0], [None]], IDS.type)),
        r"train\.parquet:row 1: a label id is null",
    ),
    (
        "no label",
        table("train", text=TEXTS, labels=pa.array([[0], []], IDS.type)),
        r"train\.parquet:row 1: a training document without",
    ),
    ("empty text", table("test", text=pa.array(["a", ""]), labels=IDS), r"test\.parquet:row 1: the text is empty"),
    (
        "out of range",
        table("test", text=TEXTS, labels=pa.array([[0], [4]], IDS.type)),
        r"test\.parquet:row 1: label id 4 is out of range",
    ),
    (
        "negative",
        table("test", text=TEXTS, labels=pa.array([[-3], [0]], IDS.type)),
        r"test\.parquet:row 0: label id -3 is negative",
    ),
    (
        "repeated",
        table("test", text=TEXTS, labels=pa.array([[0], [1, 1]], IDS.type)),
        r"test\.parquet:row 1: label id 1 is repeated",
    ),
    (
        "broken UTF-8",
        table("train", text=BROKEN_TEXT, labels=IDS),
        r"train\.parquet:row 1: `text` is not UTF-8, found b'\\xff'",
    ),
    (
        "ids out of order",
        table("labels", id=pa.array([1, 0, 2, 3]), text=pa.array(list("abcd"))),
        r"labels\.parquet:row 0: label id 1, expected 0",
    ),
    (
        "filter out of range",
        table("filter", document=pa.array([2]), label=pa.array([0])),
        r"filter\.parquet:row 0: document 2 is out",
    ),
    (
        "filter label",
        table("filter", document=pa.array([1]), label=pa.array([4])),
        r"filter\.parquet:row 0: label id 4 is out of range",
    ),
]

LAYOUTS = {
    "xc_json": (write_json_layout, JSON),
    "xc_sparse": (write_sparse_layout, SPARSE),
    "xc_raw": (write_raw_layout, RAW),
    "parquet": (write_parquet_layout, PARQUET),
}
CASES = [pytest.param(layout, *case[1:], id=f"{layout}: {case[0]}") for layout, (_, cases) in LAYOUTS.items() for case in cases]


@pytest.mark.parametrize(("layout", "change", "message"), CASES)
def test_bad_input(layout: str, change: Break, message: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    LAYOUTS[layout][0](raw)
    change(raw)
    with pytest.raises(InputError) as caught:
        build_corpus(config(layout), raw, tmp_path / "place" / "corpus")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    place = tmp_path / "place"
    assert not place.exists() or leftovers(place) == []
