from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fanin import evaluation, metrics
from fanin.config import Config
from fanin.data.tokens import TokenSet, write_tokens
from fanin.evaluation import OUTS, choose_documents, evaluate
from fanin.files import InputError, write_json
from fanin.model import Classifier
from tiny import tiny_encoder_folder, tiny_labels, tiny_texts, tiny_tokenizer

LABELS, TRAIN, TEST = 120, 400, 150
UNLABELLED = 17  # a test document without labels


def write_test_set(root: Path, documents: int = TEST, unlabelled: tuple[int, ...] = (UNLABELLED,)) -> None:
    """test.parquet and test.arrow under root; small row groups, so that reading crosses their borders."""
    labels = [[] if i in unlabelled else own for i, own in enumerate(tiny_labels(documents, LABELS, seed=2))]
    table = pa.table({"text": tiny_texts(documents, seed=3), "labels": pa.array(labels, pa.list_(pa.int32()))})
    pq.write_table(table, root / "data/corpus/test.parquet", row_group_size=40)
    write_tokens(table.to_batches(), root / "data/tokens/test.arrow", tiny_tokenizer(), max_length=32, rows_a_batch=64)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Config]:
    """A corpus, its tokens and an untrained model, laid out as a project's root is."""
    root = Path(tmp_path_factory.mktemp("project"))
    for folder in ("data/corpus", "data/tokens", "reports"):
        (root / folder).mkdir(parents=True)
    write_test_set(root)
    frequency = np.bincount(np.concatenate(tiny_labels(TRAIN, LABELS, seed=1)), minlength=LABELS).astype(np.int32)
    frequency[-1] = 0  # a label that training never saw
    names = [f"label «{label}»" for label in range(LABELS)]
    table = pa.table({"id": np.arange(LABELS, dtype=np.int32), "text": names, "frequency": frequency})
    pq.write_table(table, root / "data/corpus/labels.parquet")
    write_json(root / "data/corpus/corpus.json", {"train_documents": TRAIN, "labels": LABELS})
    config = Config()
    config.encoder.name = str(tiny_encoder_folder(root))
    config.head.fan_in, config.head.intermediate = 8, 0
    config.tokens.max_length = 32
    config.train.device, config.train.precision = "cpu", "fp32"
    config.evaluate.bootstrap, config.evaluate.batch = 50, 16
    config.evaluate.head_frequency, config.evaluate.tail_frequency = 20, 3
    Classifier.build(config, LABELS).save(root / "models", root / "data/corpus/labels.parquet")
    return root, config


@pytest.fixture
def project(built, tmp_path) -> tuple[Path, Config]:
    """A copy of it to change."""
    root = tmp_path / "project"
    shutil.copytree(built[0], root)
    config = Config()
    config.evaluate = type(config.evaluate)(**vars(built[1].evaluate))
    return root, config


def run(root: Path, config: Config) -> dict[str, float]:
    return evaluate(config, root / "models", root / "data/tokens", root / "data/corpus", root / "reports")


def read(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def all_logits(root: Path) -> np.ndarray:
    """[TEST, L]: every logit of every test document, each document alone."""
    classifier = Classifier.load(root / "models")
    tokens = TokenSet.open(root / "data/tokens/test.arrow")
    rows = []
    with torch.inference_mode():
        for row in range(len(tokens)):
            ids = torch.from_numpy(tokens.ids(np.array([row]))[0].astype(np.int64))[None]
            rows.append(classifier.head.logits(classifier.features(ids, torch.ones_like(ids)), 0, LABELS)[0].numpy())
    return np.stack(rows)


def test_figures_predictions_and_texts_are_those_of_the_models_own_logits(project):
    root, config = project
    found = run(root, config)
    assert sorted(path.name for path in (root / "reports").iterdir()) == sorted(OUTS)
    assert found == read(root / "reports/metrics.json")
    at_three = [f"{name}@{k}" for name in ("P", "nDCG", "PSP", "PSnDCG") for k in (1, 3, 5)]
    assert set(found) == {*at_three, *(f"recall@{k}" for k in (1, 3, 5, 10, 100))}

    order = np.argsort(-all_logits(root), axis=1, kind="stable")
    true = pq.read_table(root / "data/corpus/test.parquet")["labels"].to_pylist()
    for k in (1, 3, 5):
        shares = [len(set(row[:k]) & set(own)) / k for row, own in zip(order, true, strict=True)]
        assert found[f"P@{k}"] == pytest.approx(100 * np.mean(shares), abs=0.006)
    shares = [len(set(row[:100]) & set(own)) / max(len(own), 1) for row, own in zip(order, true, strict=True)]
    assert found["recall@100"] == pytest.approx(100 * np.mean(shares), abs=0.006)
    assert 0 < found["recall@10"] < found["recall@100"] < 100

    predictions = pq.read_table(root / "reports/predictions.parquet").to_pylist()
    texts = pq.read_table(root / "data/corpus/test.parquet")["text"].to_pylist()
    assert [row["document"] for row in predictions] == list(range(TEST))
    for row, own, text, ranked in zip(predictions, true, texts, order, strict=True):
        assert (row["text"], row["labels"]) == (text, own)
        assert row["label_texts"] == [f"label «{label}»" for label in own]
        assert row["predicted"] == ranked[:10].tolist()
        assert row["predicted_texts"] == [f"label «{label}»" for label in row["predicted"]]
        assert row["hits"] == [label in own for label in row["predicted"]]
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert predictions[UNLABELLED]["labels"] == []


def test_evaluation_json_holds_splits_intervals_and_buckets_that_fit_together(project):
    root, config = project
    found = run(root, config)
    whole = read(root / "reports/evaluation.json")
    assert whole["metrics"] == found
    assert (whole["documents"], whole["documents_without_labels"], whole["filtered_pairs"]) == (TEST, 1, 0)
    assert (whole["ranked_labels"], whole["notes"]) == (100, [])
    assert (whole["precision"], whole["device"]) == ("float32", "cpu")
    frequency = pq.read_table(root / "data/corpus/labels.parquet")["frequency"].to_numpy()
    sizes = {"head": (frequency >= 20).sum(), "tail": (frequency <= 3).sum()}
    sizes["torso"] = LABELS - sizes["head"] - sizes["tail"]
    assert min(sizes.values()) > 0
    assert {name: split["labels"] for name, split in whole["splits"].items()} == sizes
    pairs = sum(len(own) for own in pq.read_table(root / "data/corpus/test.parquet")["labels"].to_pylist())
    assert sum(split["pairs"] for split in whole["splits"].values()) == pairs
    for name in ("P@1", "P@5", "PSP@3"):
        assert sum(split[name] for split in whole["splits"].values()) == pytest.approx(found[name], abs=0.02)
    for name, value in {**found, "tail/recall@100": whole["splits"]["tail"]["recall@100"]}.items():
        low, high = whole["intervals"][name]
        assert low <= value <= high, name
    assert whole["bootstrap"]["resamples"] == 50
    with open(root / "reports/frequency.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["bucket"] for row in rows] == [bucket["bucket"] for bucket in whole["buckets"]]
    assert sum(int(row["labels"]) for row in rows) == LABELS
    assert rows[0]["bucket"] == "0"


@pytest.mark.parametrize(("device", "precision"), [("cpu", "bfloat16"), ("cuda", "float32")])
def test_the_precision_is_that_of_training_where_the_device_is(project, device, precision):
    root, config = project
    path = root / "models/fanin.json"
    description = read(path)
    assert (description["device"], description["precision"]) == ("cpu", "float32")
    write_json(path, description | {"device": device, "precision": "bfloat16"})
    run(root, config)
    assert read(root / "reports/evaluation.json")["precision"] == precision


def test_repeated_evaluations_agree_whatever_the_seed(project):
    root, config = project
    run(root, config)
    first = read(root / "reports/evaluation.json")
    predictions = pq.read_table(root / "reports/predictions.parquet")
    config.seed = 99
    run(root, config)
    again = read(root / "reports/evaluation.json")
    timings = {"seconds", "ranking_seconds", "documents_per_second"}
    assert {k: v for k, v in again.items() if k not in timings} == {k: v for k, v in first.items() if k not in timings}
    assert pq.read_table(root / "reports/predictions.parquet").equals(predictions)


def test_a_part_of_the_documents_is_the_start_of_a_fixed_shuffle(project):
    root, config = project
    config.evaluate.documents = 30
    run(root, config)
    chosen = choose_documents(TEST, 30)
    texts = pq.read_table(root / "data/corpus/test.parquet")["text"].to_pylist()
    predictions = pq.read_table(root / "reports/predictions.parquet")
    assert predictions["document"].to_pylist() == chosen.tolist()
    assert predictions["text"].to_pylist() == [texts[row] for row in chosen]
    assert read(root / "reports/evaluation.json")["documents"] == 30

    assert len(set(chosen)) == 30
    assert chosen.tolist() != list(range(30))
    assert set(chosen) <= set(choose_documents(TEST, 60))
    assert choose_documents(5, 5).tolist() == choose_documents(5, None).tolist() == [0, 1, 2, 3, 4]


def test_filtered_pairs_leave_the_ranking_but_not_the_true_labels(project):
    root, config = project
    before = run(root, config)
    predictions = pq.read_table(root / "reports/predictions.parquet").to_pylist()
    hits = [(row["document"], row["predicted"][0]) for row in predictions if row["hits"][0]]
    assert hits
    documents, labels = (np.array(column, dtype=np.int32) for column in zip(*hits, strict=True))
    pq.write_table(pa.table({"document": documents, "label": labels}), root / "data/corpus/filter.parquet")
    after = run(root, config)
    again = pq.read_table(root / "reports/predictions.parquet").to_pylist()
    assert read(root / "reports/evaluation.json")["filtered_pairs"] == len(hits)
    assert after["recall@100"] < before["recall@100"]
    for document, label in hits:
        assert label in again[document]["labels"]
        assert again[document]["predicted"][:9] == predictions[document]["predicted"][1:]


def test_recall_beyond_the_number_of_labels_is_noted(project):
    root, config = project
    few = 12
    labels = pq.read_table(root / "data/corpus/labels.parquet").slice(0, few)
    pq.write_table(labels, root / "data/corpus/labels.parquet")
    table = pq.read_table(root / "data/corpus/test.parquet")
    kept = pa.array([[label for label in own if label < few] for own in table["labels"].to_pylist()], pa.list_(pa.int32()))
    table = table.set_column(1, "labels", kept)
    pq.write_table(table, root / "data/corpus/test.parquet")
    write_tokens(table.to_batches(), root / "data/tokens/test.arrow", tiny_tokenizer(), max_length=32)
    model = Classifier.load(root / "models").config
    model.encoder.name = str(root / "encoder")
    Classifier.build(model, few).save(root / "models", root / "data/corpus/labels.parquet")
    found = run(root, config)
    whole = read(root / "reports/evaluation.json")
    assert whole["ranked_labels"] == few
    assert [note.split()[0] for note in whole["notes"]] == ["recall@100"]
    share = np.mean([bool(own) for own in kept.to_pylist()])
    assert found["recall@100"] == pytest.approx(100 * share, abs=0.006)  # all 12 are ranked: everything is found


def test_nothing_changes_on_disk_when_a_step_fails(project, monkeypatch):
    root, config = project
    run(root, config)
    before = {name: (root / "reports" / name).read_bytes() for name in OUTS}
    config.evaluate.documents = 20

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "_write_buckets", fail)
    with pytest.raises(InputError, match="the disk is full"):
        run(root, config)
    assert {path.name: path.read_bytes() for path in (root / "reports").iterdir()} == before


def nothing_written(root: Path) -> bool:
    return not list((root / "reports").iterdir())


def spoil_labels(root: Path) -> None:
    pq.write_table(pq.read_table(root / "data/corpus/labels.parquet").slice(1), root / "data/corpus/labels.parquet")


def spoil_filter(root: Path) -> None:
    pairs = pa.table({"document": np.array([0, 3], np.int32), "label": np.array([1, LABELS], np.int32)})
    pq.write_table(pairs, root / "data/corpus/filter.parquet")


def spoil_test_set(root: Path) -> None:
    table = pq.read_table(root / "data/corpus/test.parquet")
    pq.write_table(table.slice(5), root / "data/corpus/test.parquet")


def spoil_model(root: Path) -> None:
    classifier = Classifier.load(root / "models")
    with torch.no_grad():
        list(classifier.encoder.parameters())[-1].fill_(3e38)  # finite, so it loads; sums of it are not
    classifier.save(root / "models", root / "data/corpus/labels.parquet")


def truncate_test_set(root: Path) -> None:
    path = root / "data/corpus/test.parquet"
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_labels, r"models: the model ranks 120 labels, but the corpus has 119; train it again"),
        (spoil_filter, r"filter.parquet: label 120 is outside 0..119; rerun the corpus stage"),
        (spoil_test_set, r"test.parquet has 145 documents, the tokens 150; rerun the tokens stage"),
        (spoil_model, r"models: the model gives scores that are not numbers"),
        (truncate_test_set, r"test.parquet cannot be read .* rerun the corpus stage"),
        (lambda root: write_test_set(root, 2, (0, 1)), r"none of the 2 documents evaluated has a label"),
        (lambda root: (root / "data/corpus/labels.parquet").unlink(), r"labels.parquet is missing; run the corpus stage"),
        (lambda root: (root / "data/corpus/test.parquet").unlink(), r"test.parquet is missing; run the corpus stage"),
        (lambda root: (root / "data/tokens/test.arrow").unlink(), r"test.arrow is missing"),
        (lambda root: (root / "models/head.safetensors").unlink(), r"head.safetensors is missing"),
    ],
)
def test_folders_that_do_not_fit_are_named_and_nothing_is_written(project, spoil, message):
    root, config = project
    spoil(root)
    with pytest.raises(InputError, match=message):
        run(root, config)
    assert nothing_written(root)


def test_a_propensity_setting_that_cannot_work_is_named(project):
    root, config = project
    config.evaluate.propensity_b = 0.0
    with pytest.raises(InputError, match=r"evaluate.propensity_b: 0.0 gives 1 labels"):
        run(root, config)
    assert nothing_written(root)


def test_an_empty_test_set_is_an_error(project):
    root, config = project
    schema = pq.read_schema(root / "data/corpus/test.parquet")
    pq.write_table(schema.empty_table(), root / "data/corpus/test.parquet")
    write_tokens([], root / "data/tokens/test.arrow", tiny_tokenizer(), max_length=32)
    with pytest.raises(InputError, match="holds no document to evaluate on"):
        run(root, config)


def test_the_stage_reports_what_it_wrote(project, monkeypatch):
    root, config = project
    monkeypatch.chdir(root)
    spec = importlib.util.spec_from_file_location("stage", Path(__file__).parents[1] / "pipeline/evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    told: dict[str, Any] = {"artifacts": []}

    class Run:
        def metrics(self, values: dict[str, float]) -> None:
            told["metrics"] = values

        def artifact(self, path: Path) -> None:
            assert path.is_file()
            told["artifacts"].append(path.as_posix())

    stage.main(config, Run())
    assert told["metrics"] == read(root / "reports/metrics.json")
    assert told["artifacts"] == [f"reports/{name}" for name in OUTS]


def test_score_needs_no_model():
    """Two labels, one of them seen often: all of the splits' names are there, whether or not a label is in them."""
    frequency = np.array([100, 0])
    ranked = np.array([[0, 1], [1, 0]], dtype=np.int32)
    offsets, true = metrics.csr([np.array([0]), np.array([0])])
    hits = metrics.match(ranked, offsets, true)
    found = evaluation.score(Config().evaluate, frequency, np.array([1.0, 4.0]), ranked, hits, offsets, true)
    assert found["metrics"]["P@1"] == found["splits"]["head"]["P@1"] == 50
    assert found["splits"]["torso"]["labels"] == 0
    assert found["splits"]["tail"] == {"labels": 1, "pairs": 0, **{f"{m}@{k}": 0.0 for k in (1, 3, 5) for m in ("P", "PSP")}}
