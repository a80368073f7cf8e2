"""One small corpus in each raw layout, for the tests of the corpus stage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fanin.config import Config

TRAIN = [("red apple", [2, 0]), ("größe · 大", [1]), ("green pear", [0])]
TEST = [("yellow plum", [0, 3]), ("blue fig", [])]
LABELS = ["fruit", "size", "apple", "plum"]


def config(layout: str, label_documents: bool = False) -> Config:
    made = Config(preset="mine")
    made.corpus.format, made.corpus.label_documents = layout, label_documents
    return made


def write(path: Path, lines: list[str], packed: bool = False) -> None:
    data = "".join(line + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def write_json_layout(raw: Path, packed: bool = False) -> None:
    for name, documents in (("trn", TRAIN), ("tst", TEST)):
        records = [{"uid": "u", "title": t, "target_ind": ids, "target_rel": [1.0] * len(ids)} for t, ids in documents]
        write(raw / f"{name}.json", [json.dumps(record) for record in records], packed)
    write(raw / "lbl.json", [json.dumps({"uid": "u", "title": text, "content": ""}) for text in LABELS], packed)
    write(raw / "filter_labels_test.txt", ["0 2", "1 0"], packed)


def write_sparse_layout(raw: Path, packed: bool = False, folder: str = "") -> None:
    for name, documents in (("trn", TRAIN), ("tst", TEST)):
        write(raw / folder / f"{name}_X.txt", [text for text, _ in documents], packed)
        rows = [" ".join(f"{id}:1.0" for id in ids) for _, ids in documents]
        write(raw / f"{name}_X_Y.txt", [f"{len(rows)} {len(LABELS)}", *rows], packed)
    write(raw / folder / "Y.txt", LABELS, packed)
    write(raw / "filter_labels_test.txt", ["0 2", "1 0"], packed)


def write_raw_layout(raw: Path, packed: bool = False) -> None:
    for name, documents in (("train", TRAIN), ("test", TEST)):
        write(raw / f"{name}_raw_texts.txt", [text for text, _ in documents], packed)
        write(raw / f"{name}_labels.txt", [" ".join(f"a_{LABELS[id]}" for id in ids) for _, ids in documents], packed)


def write_parquet_layout(raw: Path) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", TRAIN), ("test", TEST)):
        columns = {
            "text": pa.array([t for t, _ in documents]),
            "labels": pa.array([i for _, i in documents], pa.list_(pa.int64())),
        }
        pq.write_table(pa.table(columns), raw / f"{name}.parquet")
    pq.write_table(pa.table({"id": range(len(LABELS)), "text": LABELS}), raw / "labels.parquet")
    pq.write_table(pa.table({"document": [0, 1], "label": [2, 0]}), raw / "filter.parquet")


def rows(path: Path) -> list[tuple]:
    table = pq.read_table(path)
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
