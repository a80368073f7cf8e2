"""Label texts: memory-mapped, copied in batches, refused where they are not a table of texts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanin.files import InputError
from fanin.label_texts import LabelTexts


def corpus_labels(folder: Path, texts: list[str]) -> Path:
    path = folder / "labels.parquet"
    pq.write_table(pa.table({"id": pa.array(range(len(texts)), pa.int32()), "text": texts}), path)
    return path


def test_texts_come_back_by_label_from_every_batch(tmp_path: Path) -> None:
    texts = [f"label «{number}»" for number in range(150_000)]  # more than two batches
    texts[7] = ""
    LabelTexts.write(corpus_labels(tmp_path, texts), tmp_path / LabelTexts.FILE)
    found = LabelTexts(tmp_path / LabelTexts.FILE)
    assert len(found) == len(texts)
    for label in (0, 7, 65_535, 65_536, 149_999):
        assert found[label] == texts[label]


def test_opening_reads_nothing_into_memory(tmp_path: Path) -> None:
    LabelTexts.write(corpus_labels(tmp_path, ["x" * 40] * 100_000), tmp_path / LabelTexts.FILE)
    before = pa.total_allocated_bytes()
    found = LabelTexts(tmp_path / LabelTexts.FILE)
    assert found[99_999] == "x" * 40
    assert pa.total_allocated_bytes() - before < 100_000


def test_what_is_no_table_of_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no table")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "nameless")
    for name in ("missing", "broken", "nameless"):
        with pytest.raises(InputError, match=rf"{name}: not a readable table of label texts .*rerun the corpus stage"):
            LabelTexts.write(tmp_path / name, tmp_path / "out")
        with pytest.raises(InputError, match=rf"{name}: not a readable table of label texts .*rerun the train stage"):
            LabelTexts(tmp_path / name)
