"""Records, tables and the page: figures are the evaluate stage's own, and the page says what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanin.config import Evaluate
from fanin.files import InputError, write_json
from study import page, plots
from study.methods import Method
from study.records import FIGURES, Records, quality, scored, sizes
from study.summary import summary
from study.tables import markdown, recovery, results, rows, write_csv

METHODS = {
    method.name: method
    for method in (
        Method("bonsai", "Bonsai", "rival"),
        Method("dense", "dense", "trained", role="dense"),
        Method("dense_start", "dense, better", "trained", role="dense"),
        Method("plain", "plain sparse", "trained", role="floor"),
        Method("good", "good sparse", "trained", against="dense_start"),
    )
}


def record(method: str, seed: int, p1: float, **more: Any) -> dict[str, Any]:
    kind = METHODS[method].kind
    size = {"model_mib": 90.0} | ({} if kind == "rival" else {"head_mib": 3.0, "shared_mib": 2.0, "dense_mib": 24.0})
    splits = {split: {"P@5": p1 / 3, "PSP@5": p1 / 6, "recall@5": 10.0} for split in ("head", "torso", "tail")}
    curve = {} if kind == "rival" else {"curve": [{"step": 1, "P@1": p1 / 2}, {"step": 2, "P@1": p1}]}
    told = {
        "steps": 821,
        "train_seconds": 100.0,
        "peak_mib": 900.0,
        "device": "a box",
        "commit": "c" * 40,
        "wall_seconds": 120.0,
    }
    data = {"train_documents": 72912, "test_documents": 18073, "labels": 4, "labels_seen_once": 2, "labels_per_document": 3.0}
    return (
        {"method": method, "about": METHODS[method].about, "kind": kind, "tier": "main", "corpus": "near", "seed": seed}
        | {name: p1 for name in FIGURES}
        | size
        | splits
        | curve
        | told
        | {"data": data}
        | more
    )


RECORDS = [
    record("dense", 1, 68.0),
    record("dense_start", 1, 69.0),
    record("dense_start", 2, 71.0),
    record("plain", 1, 50.0),
    record("good", 1, 65.0),
    record("bonsai", 1, 63.0, note="On a busy machine."),
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four labels, three test documents, of which one has no label."""
    labels = pa.table(
        {"id": pa.array(range(4), pa.int32()), "text": list("abcd"), "frequency": pa.array([60, 9, 1, 1], pa.int32())}
    )
    pq.write_table(labels, tmp_path / "labels.parquet")
    truth = pa.array([[0, 2], [], [1]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"text": ["x", "y", "z"], "labels": truth}), tmp_path / "test.parquet")
    write_json(tmp_path / "corpus.json", {"train_documents": 70})
    return tmp_path


def test_a_ranking_is_scored_as_the_evaluate_stage_does(corpus: Path) -> None:
    ranked = np.array([[0, 1, 2, -1, -1], [3, 2, 1, 0, -1], [2, 1, 0, -1, -1]], np.int32)
    found = quality(scored(ranked, corpus, Evaluate(bootstrap=10)))
    assert found["P@1"] == pytest.approx(100 / 3, abs=0.01)
    assert found["P@3"] == pytest.approx(100 * 3 / 9, abs=0.01)
    assert found["P@5"] == pytest.approx(100 * 3 / 15, abs=0.01)
    assert (found["head"]["labels"], found["torso"]["labels"], found["tail"]["labels"]) == (1, 1, 2)
    parts = sum(found[split]["P@5"] for split in ("head", "torso", "tail"))
    assert parts == pytest.approx(found["P@5"], abs=0.03)
    assert set(FIGURES) <= set(found["intervals"])


@pytest.mark.parametrize("ranked", [np.zeros((2, 5), np.int32), np.full((3, 5), 4, np.int32)])
def test_a_ranking_of_another_corpus_is_refused(ranked: np.ndarray, corpus: Path) -> None:
    with pytest.raises(InputError, match="do not fit the 3 test documents"):
        scored(ranked, corpus, Evaluate())


def test_a_record_replaces_the_one_of_the_same_method_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = Records(tmp_path / "study.json")  # another study on the same file, which began before
    path = tmp_path / "study.json"
    for value in (1.0, 2.0):
        Records(path).add(record("good", 1, value))
    Records(path).add(record("good", 2, 3.0, wall_seconds=500.0))
    found = Records(path)
    assert [r["P@1"] for r in found.all] == [2.0, 3.0]
    assert found.seconds("good", "trained") == 500  # the longest of its own
    assert found.seconds("plain", "trained") == 500  # of its kind
    assert found.seconds("bonsai", "rival") == 500  # of all
    assert Records(tmp_path / "none.json").seconds("good", "trained") == 0
    Records(path).add(record("dense", 1, 3.0, wall_seconds=0.0))  # it had run before
    assert Records(path).seconds("dense", "trained") == 500
    other.add(record("plain", 1, 4.0))
    assert [r["P@1"] for r in Records(path).all] == [3.0, 2.0, 3.0, 4.0]


def test_sizes_count_the_bias_and_compare_with_dense_of_the_same_type() -> None:
    head = {"weights": 1000 * 32 * 2, "indices": 1000 * 32 * 2, "bias": 4000, "optimizer": 10**9}
    found = sizes(head, 2**20, labels=1000, width=384, itemsize=2)
    assert found["head_mib"] == pytest.approx((128_000 + 4000) / 2**20, abs=1e-4)
    assert found["shared_mib"] == 1.0
    assert found["dense_mib"] == pytest.approx((1000 * 384 * 2 + 4000) / 2**20, abs=1e-4)


def test_recovery_goes_from_the_floor_to_the_best_dense() -> None:
    found = rows(RECORDS, METHODS)
    by_name = {row.name: row for row in found}
    assert [row.name for row in found] == list(METHODS)
    assert by_name["dense_start"].mean("P@1") == 70
    assert by_name["dense_start"].spread("P@1") == pytest.approx(2**0.5)
    assert recovery(by_name["plain"], found, METHODS, "P@1") == 0
    assert recovery(by_name["good"], found, METHODS, "P@1") == 75
    assert recovery(by_name["dense_start"], found, METHODS, "P@1") == 100
    assert recovery(by_name["good"], found[1:3], METHODS, "P@1") is None  # no floor yet
    longer = rows([*RECORDS[:1], *RECORDS[3:], record("dense_start", 1, 90.0, steps=4000)], METHODS)
    by_name = {row.name: row for row in longer}
    assert recovery(by_name["good"], longer, METHODS, "P@1") == pytest.approx(100 * 15 / 18)  # of 68: 90 took more steps
    assert recovery(by_name["dense_start"], longer, METHODS, "P@1") is None  # no floor of its budget


def test_the_table_has_a_line_a_method_and_names_what_was_not_there() -> None:
    absent = {"method": "bonsai", "seed": 1, "about": "Bonsai", "unavailable": "cannot be imported", "kind": "rival"}
    text = results([*RECORDS[:-1], absent], METHODS)
    assert "| `dense_start` " in text
    assert "- `dense_start`: dense, better\n" in text
    assert "70.00 ± 1.41" in text
    assert "75 %" in text
    assert "- Bonsai: not available here (cannot be imported)" in text
    assert "0.125" in text  # 3 of 24 MiB
    assert results([], METHODS) == "No records yet."


def test_the_summary_pairs_runs_of_one_device_commit_and_seed() -> None:
    here = [*RECORDS, record("good", 2, 66.0), record("good", 3, 99.0)]  # the dense method has no seed 3
    here += [record(name, 1, 72.0, steps=4000, commit="e" * 40) for name in ("good", "dense_start")]  # another budget
    there = [record("good", 1, 40.0), record("dense_start", 1, 80.0, commit="d" * 40)]
    table = summary({"Near": [here, there], "Elsewhere": [there]}, METHODS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    good, dense, longer, _, rival = cells[2:]
    assert good[:6] == ["Near", "`good`", "821", "2", "0.125", "0.208"]
    assert good[6] == "65.50 ± 0.71"
    assert good[-1] == "93.6 ± 0.9 %"  # 65 of 69 and 66 of 71
    assert dense[:4] == ["Near", "`dense_start`", "821", "2"]
    assert longer[:4] == ["Near", "`good`", "4,000", "1"]
    assert longer[-1] == "100.0 %"
    assert rival[:6] == ["Near", "`bonsai`", "-", "1", "-", "-"]
    assert summary({"Near": [there]}, METHODS) == "No records yet."


def test_markdown_lines_up() -> None:
    lines = markdown(["a", "b"], [["long name", "1"], ["x", "22.5"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].endswith("-: |")


def test_csv_has_a_line_a_record(tmp_path: Path) -> None:
    write_csv(RECORDS, tmp_path / "study.csv")
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 1 + len(RECORDS)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    assert plots.pareto([(2, 60.0), (1, 50.0), (3, 55.0), (4, 70.0), (1, 40.0)]) == [1, 0, 3]


def test_names_of_near_marks_do_not_lie_on_each_other() -> None:
    figure, axis = plots.plt.subplots()
    axis.set(xlim=(1, 20), ylim=(0, 1), xscale="log")
    plots._name(axis, [(name, 2.0, 0.5, "black") for name in ("sparse_texts", "sparse_profiles", "dense_refitted", "sparse")])
    boxes = [text.get_window_extent() for text in axis.texts]
    plots.plt.close(figure)
    assert [text.get_text() for text in axis.texts] == ["sparse_texts", "sparse_profiles", "dense_refitted", "sparse"]
    assert not any(one.overlaps(two) for number, one in enumerate(boxes) for two in boxes[:number])


def test_all_plots_are_drawn(tmp_path: Path) -> None:
    drawn = plots.draw_all(RECORDS, METHODS, "near", tmp_path)
    assert {path.stem for path in drawn} == set(page.CAPTIONS)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plots.draw_all([], METHODS, "near", tmp_path / "none") == []


def test_the_page_takes_its_figures_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs/study.md"
    path.write_text("Words.\n\n<!-- records: near -->\nold\n<!-- end -->\n\nMore.\n\n<!-- records: debian -->\n<!-- end -->\n")
    (tmp_path / "benchmarks/results/study-near-a-box.json").write_text(json.dumps(RECORDS))
    assert page.main(["--check"]) == 1
    assert page.main([]) == 0
    text = path.read_text()
    assert text.startswith("Words.\n")
    assert "old" not in text
    assert text.count("On a busy machine.") == 1
    assert "72,912 training documents, 18,073 test documents, 4 labels of which 2 have one" in text
    assert "70.00 ± 1.41" in text or "69.00" in text
    assert "(study/near-a-box/bytes.png)" in text
    assert (tmp_path / "docs/study/near-a-box/bytes.png").exists()
    assert text.count("No records yet.") == 1  # Debian's
    assert page.main(["--check"]) == 0
    (tmp_path / "benchmarks/results/study-near-a-box.json").write_text(json.dumps(RECORDS[:-1]))
    assert page.main(["--check"]) == 1


def test_each_device_has_a_section_of_its_own_and_the_fuller_set_comes_first(tmp_path: Path) -> None:
    better = [record("dense", 1, 80.0, device="a GPU"), record("plain", 1, 60.0, device="a GPU")]
    (tmp_path / "study-near-b-gpu.json").write_text(json.dumps(better))
    rival = record("bonsai", 1, 63.0, kind="rival", train_seconds=777.0)
    (tmp_path / "study-near-a-box.json").write_text(json.dumps([record("dense", 1, 70.0), rival]))
    first, second = page.generated("near", METHODS, page.by_device("near", METHODS, tmp_path)).split("2 records, ")[1:]
    assert first.startswith("a GPU")
    assert "80.00" in first
    assert "70.00" not in first
    assert "100 %" in first  # the hole's ends are this device's own
    assert "63.00" in first  # the rival's accuracy depends on no device, its time does
    assert "study-near-a-box.json" in first
    assert "777" not in first
    assert second.startswith("a box")
    assert "777" in second
    assert "%" not in second.split("\n\n")[1]  # no floor there
    assert "</details>" in second


def test_the_committed_page_is_what_the_committed_records_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    assert page.main(["--check"]) == 0, capsys.readouterr().out
