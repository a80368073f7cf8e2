"""The report: what it shows equals what the stages left, whatever the texts hold and whichever file is absent."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanin.config import Config
from fanin.files import InputError
from fanin.reporting import figures, plots
from fanin.reporting.page import duration, head_in_words, settings, size, write_report
from fanin.reporting.records import STAGES, Records

LABELS, FEATURES, FAN_IN = 300, 96, 8
EVIL = '<script>alert("x")</script> & <img src="http://evil.example/x.png" onerror=alert(1)>'


def make_project(root: Path, config: Config, *, seed: int = 0) -> Path:
    """A project's records under `root`, in the stages' formats, with made-up figures; texts hold markup."""
    rng = np.random.default_rng(seed)
    for folder in ("data/corpus", "data/tokens", "data/embeddings", "data/clusters", "data/start", "models", "reports/stages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _corpus(root, rng)
    for stage, seconds in SECONDS.items():
        _json(root / f"reports/stages/{stage}.json", {"stage": stage, "seconds": seconds})
    sparse = config.head.kind == "fixed_fan_in"
    start_use = rng.poisson(LABELS * FAN_IN / FEATURES, FEATURES)
    moved = config.rewiring.method != "none"
    _json(
        root / "reports/train.json",
        {
            "steps": 825,
            "documents": 52800,
            "seconds": 611.2,
            "documents_per_second": 86.39,
            "batch": 64,
            "precision": "float32",
            "device": "cpu",
            "resumed_from": None,
            "final_loss": 5.4321,
            "head_bytes": {"weights": 9600, "indices": 2400, "bias": 1200, "optimizer": 9600},
            "intermediate_bytes": 2365440 if config.head.intermediate else 0,
            "dense_fp32_bytes": 115200,
            "peak_rss_mib": 1311.5,
            "feature_use_start": start_use.tolist() if sparse else None,
            "feature_use": (np.sort(start_use)[::-1] * np.linspace(1.6, 0.4, FEATURES) if moved else start_use)
            .astype(int)
            .tolist()
            if sparse
            else None,
            "moved": (0.3125 if moved else 0.0) if sparse else None,
        },
    )
    steps = range(10, 826, 10)
    _csv(
        root / "reports/train_curve.csv",
        ["step", "loss", "meta_loss", "lambda", "encoder_lr", "head_lr", "documents_per_second"],
        [_train_row(step, rng, config) for step in steps],
    )
    validation = [
        [s, 70 - 25 * math.exp(-s / 250), 55 - 20 * math.exp(-s / 250), 42 - 15 * math.exp(-s / 250)]
        for s in (200, 400, 600, 800, 825)
    ]
    _csv(root / "reports/validation_curve.csv", ["step", "P@1", "P@3", "P@5"], validation)
    rewirings = [[s, 2400, 360, 350 - s // 4, (350 - s // 4) / 2400] for s in range(100, 545, 100)] if moved else []
    _csv(root / "reports/rewiring_curve.csv", ["step", "entries", "pruned", "moved", "share"], rewirings)
    _evaluation(root, rng)
    parts = ("baseline", "encoder", "encoder_optimizer", "activations", "head_weights", "indices", "head_optimizer")
    mib = {
        "fixed_fan_in": (402.0, 88.9, 177.8, 210.0, 2.4, 1.2, 2.4),
        "dense": (402.0, 88.9, 177.8, 210.0, 27.7, 0.0, 27.7),
    }
    _json(
        root / "reports/memory.json",
        {
            "runs": [
                {
                    "head": head,
                    "predicted_mib": {**dict(zip(parts, v, strict=True)), "buffers": 30.0, "peak": sum(v) + 30},
                    "allocator_mib": 57.0 if head == "fixed_fan_in" else None,
                    "error_percent": round(100 * ((sum(v) + 30) / (sum(v) + 41.5) - 1), 2),
                    "measured_mib": {**dict(zip(parts, v, strict=True)), "buffers": 41.5, "peak": sum(v) + 41.5},
                }
                for head, v in mib.items()
            ],
            "scale": [
                {
                    "labels": n,
                    "head": head,
                    "predicted_mib": 500 + n * each,
                    "measured_peak_mib": 1126.4 if n < 200000 else None,
                }
                for n in (131072, 670091, 2812281)
                for head, each in (("fixed_fan_in", 0.0004), ("dense", 0.004))
            ],
            "device": "cpu",
            "batch": 64,
            "tokens": 48,
            "dtype": "float32",
            "seconds": 44.0,
        },
    )
    _json(root / "models/fanin.json", {"versions": {"torch": "2.12.0", "python": "3.11.2"}})
    return root


SECONDS = {"corpus": 4.1, "tokens": 9.6, "embeddings": 95.2, "clusters": 3.3, "start": 21.0}
SECONDS |= {"train": 611.2, "evaluate": 81.3, "memory": 44.0}


def _corpus(root: Path, rng: np.random.Generator) -> None:
    words = ["a valley", "of stone", "quiet", "river", "the bird", "that builds", "nests", "tall trees", "sings at dawn"]
    texts = [" ".join(rng.choice(words, rng.integers(4, 30))) for _ in range(120)]
    texts[:] = [f"{EVIL} {text}" if row % 3 == 0 else text for row, text in enumerate(texts)]
    labels = [sorted(rng.choice(LABELS, rng.integers(1, 6), replace=False).tolist()) for _ in texts]
    schema = pa.schema([("text", pa.string()), ("labels", pa.list_(pa.int32()))])
    pq.write_table(pa.table([texts, labels], schema=schema), root / "data/corpus/train.parquet", row_group_size=50)
    frequency = np.maximum(0, (4000 / np.arange(1, LABELS + 1) ** 1.1).astype(np.int32) - 8)
    names = [f"label <b>{n}</b>" if n % 2 else f"organism, being {n}" for n in range(LABELS)]
    ids = np.arange(LABELS, dtype=np.int32)
    pq.write_table(pa.table({"id": ids, "text": names, "frequency": frequency}), root / "data/corpus/labels.parquet")
    corpus = {"name": "wordnet-near", "train_documents": 72731, "test_documents": 18233, "label_documents": 0}
    corpus |= {"labels": 18912, "labels_per_document": 3.0123, "labels_seen_once": 6702}
    corpus |= {"source": "Princeton WordNet 3.0", "licence": "WordNet 3.0 licence", "checksum": "ab" * 32}
    _json(root / "data/corpus/corpus.json", corpus)
    tokens = {"documents": {"train": 72731, "test": 18233}, "mean_length": 17.4, "truncated": 0.0123, "max_length": 64}
    _json(root / "data/tokens/tokens.json", tokens)
    _json(root / "data/embeddings/embeddings.json", {"documents": 30000})
    _json(root / "data/clusters/clusters.json", {"meta_labels": 512})
    zero_shot = {"P@1": 41.8, "P@3": 33.1, "P@5": 26.4}
    _json(root / "data/start/start.json", {"source": "data", "zero_shot": zero_shot, "residual": 0.2})


def _train_row(step: int, rng: np.random.Generator, config: Config) -> list[float]:
    factor = min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / 825))
    weight = 0.2 * (1 + math.cos(math.pi * step / 400)) if config.auxiliary.enabled and step < 400 else 0.0
    loss = 5 + 12 * math.exp(-step / 120) + rng.normal(0, 0.4)
    rates = [config.train.encoder_lr * factor, config.train.head_lr * factor]
    return [step, loss, 3.0 + math.exp(-step / 90) if weight else 0.0, weight, *rates, 86 + rng.normal()]


def _evaluation(root: Path, rng: np.random.Generator) -> None:
    metrics = {"P@1": 68.21, "P@3": 53.47, "P@5": 41.02, "nDCG@1": 68.21, "nDCG@3": 61.13, "nDCG@5": 63.9}
    metrics |= {"PSP@1": 47.31, "PSP@3": 55.08, "PSP@5": 60.52, "PSnDCG@1": 47.31, "PSnDCG@3": 52.2, "PSnDCG@5": 55.7}
    metrics |= {"recall@1": 28.4, "recall@3": 58.1, "recall@5": 70.3, "recall@10": 79.6, "recall@100": 93.8}
    intervals = {name: [round(value - 0.68, 2), round(value + 0.66, 2)] for name, value in metrics.items()}
    splits: dict[str, dict[str, Any]] = {}
    for name, recall, share, labels in (("head", 84.2, 24.1, 31), ("torso", 71.6, 21.3, 90), ("tail", 52.9, 15.1, 179)):
        splits[name] = {"labels": labels, "pairs": 900, "recall@5": recall, "PSP@5": share, "P@5": share / 2}
        intervals |= {f"{name}/recall@5": [recall - 1.5, recall + 1.4], f"{name}/PSP@5": [share - 0.5, share + 0.5]}
    names = ["0", "1", "2-5", "6-10", "11-20", "21-50", "51-100", "101-1000", "1001+"]
    buckets = [
        {
            "bucket": name,
            "labels": 60 - 5 * n,
            "pairs": 100 + n,
            **{f"recall@{k}": 20 + 6.1 * n + k / 5 for k in (1, 3, 5, 10, 100)},
        }
        for n, name in enumerate(names)
    ]
    evaluation = {
        "documents": 18233,
        "splits": splits,
        "intervals": intervals,
        "buckets": buckets,
        "notes": [],
        "seconds": 81.3,
    }
    _json(root / "reports/metrics.json", metrics)
    _json(root / "reports/evaluation.json", evaluation)
    rows = []
    for row in range(40):
        true = sorted(rng.choice(LABELS, 3, replace=False).tolist())
        ranked = [true[0], *[int(n) for n in rng.choice(LABELS, 9, replace=False) if n not in true[:1]]][:10]
        text = f"{EVIL} test document {row}" if row % 2 else f"plain test document {row}: " + "gloss and lemmas " * 4
        rows.append(
            {
                "document": row,
                "text": text,
                "labels": true,
                "label_texts": [f"<i>label</i> {n}" for n in true],
                "predicted": ranked,
                "predicted_texts": [f"<i>label</i> {n}" for n in ranked],
                "scores": [4.0 - 0.75 * place for place in range(len(ranked))],
                "hits": [n in true for n in ranked],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), root / "reports/predictions.parquet", row_group_size=16)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _csv(path: Path, header: list[str], rows: list[list[float]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


# the page ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text outside script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.words.append(" ")
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.words.append(data)

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


@pytest.fixture
def config() -> Config:
    config = Config()
    config.rewiring.method = "rigl"
    config.auxiliary.enabled = True
    config.train.head_lr = 0.08
    return config


@pytest.fixture
def project(tmp_path: Path, config: Config) -> Path:
    return make_project(tmp_path, config)


def page_of(root: Path, config: Config) -> Page:
    write_report(root, config)
    return Page((root / "reports/report.html").read_text(encoding="utf-8"))


def edit(path: Path, **values: Any) -> None:
    _json(path, {**json.loads(path.read_text()), **values})


def test_page_loads_nothing_and_is_small(project: Path, config: Config) -> None:
    page = page_of(project, config)
    source = (project / "reports/report.html").read_text(encoding="utf-8")
    loading = [
        (tag, name, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "background")
    ]
    assert loading
    assert all(value and value.startswith(("#", "data:")) for _, _, value in loading), loading
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert len(source) < 2_000_000
    assert sum(tag == "svg" for tag, _ in page.tags) >= 10


def test_text_from_the_data_is_never_markup(project: Path, config: Config) -> None:
    page = page_of(project, config)
    source = (project / "reports/report.html").read_text(encoding="utf-8")
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" or any(name.startswith("on") for name in attributes) for tag, attributes in page.tags)
    assert EVIL in html.unescape(source)
    assert EVIL not in source
    assert "<i>label</i>" in page.text  # shown as it is written


def test_markup_in_names_and_settings_is_escaped(project: Path, config: Config) -> None:
    edit(project / "data/corpus/corpus.json", name=EVIL, source=EVIL, licence=EVIL)
    edit(project / "reports/train.json", device=EVIL)
    config.encoder.name = EVIL
    config.preset = EVIL
    page = page_of(project, config)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)


def test_figures_on_the_page_are_the_inputs(project: Path, config: Config) -> None:
    text = page_of(project, config).text
    metrics = json.loads((project / "reports/metrics.json").read_text())
    for value in metrics.values():
        assert f" {value:.2f}" in text
    for name in ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5"):
        low, high = metrics[name] - 0.68, metrics[name] + 0.66
        assert re.search(rf"{name}\s*{metrics[name]:.1f}\s*{low:.1f}\u2013{high:.1f}", text), name
    assert "11.7 KiB" in text  # (9600 + 2400) / 1024
    assert "112 KiB" in text  # 115200 / 1024: 112.5
    assert "9.6 \u00d7 the head's bytes" in text
    assert "86.4" in text
    assert "14 min 30 s" in text  # every stage's seconds: 869.7
    assert "18,912" in text
    assert "31.2% of the index entries read another feature than at the start; rewiring had 5 rounds" in text
    assert "fixed fan-in predicted" in text
    assert "of 64 documents of 48 tokens in float32 on cpu" in text
    assert "The plan is 1.2% below the measured peak for fixed fan-in and 1.2% below the measured peak for dense." in text
    assert "keeps up to 57 MiB more" in text
    assert "Measured: fixed fan-in 1.1 GiB at 131k, dense 1.1 GiB at 131k." in text
    assert "encoder 88.9 88.9 88.9 88.9" in text
    assert "gradients, temporaries 30.0 41.5 30.0 41.5" in text
    assert "peak 914.7 926.2 964.1 975.6" in text


def test_a_dense_layer_that_did_not_fit_is_said_to_be_unmeasured(project: Path, config: Config) -> None:
    runs = json.loads((project / "reports/memory.json").read_text())["runs"]
    runs[1] |= {"measured_mib": None, "error_percent": None}
    edit(project / "reports/memory.json", runs=runs)
    text = page_of(project, config).text
    assert "The step with the dense head was not measured" in text
    assert "gradients, temporaries 30.0 41.5 30.0 peak" in text


def test_examples_mark_predictions_by_symbol_and_word(project: Path, config: Config) -> None:
    page = page_of(project, config)
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "li"]
    table = pq.read_table(project / "reports/predictions.parquet").to_pylist()
    shown = [row for row in table if re.search(rf"test document {row['document']}\b", page.text)]
    assert len(shown) == 10
    assert classes.count("right") == sum(sum(row["hits"][:5]) for row in shown)
    assert classes.count("wrong") == 50 - classes.count("right")
    missed = sum(label not in row["predicted"][:5] for row in shown for label in row["labels"])
    assert classes.count("missed") == missed > 0
    assert page.text.count("✓") == classes.count("right") + 1  # and the key
    assert page.text.count("(wrong)") == classes.count("wrong")


def test_settings_that_differ_are_marked(config: Config) -> None:
    rows = {f"{section}.{key}": changed for section, values in settings(config) for key, _, _, changed in values}
    assert {key for key, changed in rows.items() if changed} == {"rewiring.method", "auxiliary.enabled", "train.head_lr"}
    assert "train.momentum" in rows
    assert ".seed" in rows


def test_marked_settings_show_their_default(project: Path, config: Config) -> None:
    page = page_of(project, config)
    assert sum(attributes.get("class") == "changed" for tag, attributes in page.tags if tag == "tr") == 3
    assert "head_lr 0.08 default 0.05" in page.text


@pytest.mark.parametrize("path", sorted(set(STAGES) - {"models/fanin.json"}))
def test_a_missing_file_is_named_with_its_stage(project: Path, config: Config, path: str) -> None:
    (project / path).unlink()
    text = page_of(project, config).text
    if path.startswith("reports/") or "corpus" in path:
        assert f"{path} is missing" in text
        assert f"dvc repro {STAGES[path]}" in text


def test_nothing_there_still_makes_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, Config())
    for path in ("reports/metrics.json", "reports/train.json", "reports/memory.json", "reports/predictions.parquet"):
        assert f"{path} is missing" in page.text
    run = json.loads((tmp_path / "reports/run.json").read_text())
    assert run["metrics"] == {}
    assert run["dense_to_head_ratio"] is None
    assert run["total_seconds"] == 0


@pytest.mark.parametrize("kind", ["dense", "bottleneck"])
def test_a_head_that_reads_every_feature_has_no_fan_in_section(tmp_path: Path, kind: str) -> None:
    config = Config()
    config.head.kind = kind
    page = page_of(make_project(tmp_path, config), config)
    assert "fan-in" not in page.ids()
    assert not any(attributes.get("href") == "#fan-in" for _, attributes in page.tags)
    assert "is missing" not in page.text


def test_a_static_head_says_so_and_needs_no_rewiring_file(tmp_path: Path) -> None:
    config = Config()
    root = make_project(tmp_path, config)
    (root / "reports/rewiring_curve.csv").unlink()
    page = page_of(root, config)
    assert "fan-in" in page.ids()
    assert "its indices stay as they were" in page.text
    assert "is missing" not in page.text
    titles = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert "Features by how many labels read them" in titles
    assert "Labels of a feature, before and after rewiring" not in titles


def test_a_recoded_head_says_when_and_how_well(tmp_path: Path) -> None:
    config = Config()
    root = make_project(tmp_path, config)
    config.rewiring.recode_at = 0.8
    train = json.loads((root / "reports/train.json").read_text())
    recoding = {"step": 660, "labels": 280, "residual": 0.2126, "refitted": 1500, "exchanged": 4321}
    _json(root / "reports/train.json", train | {"recoding": recoding, "moved": 0.409})
    text = " ".join(page_of(root, config).text.split())
    assert "At step 660, 280 labels were coded anew" in text
    said = "leave 21.3% of a row in the mean. The head then learnt alone from those documents' embeddings, 1,500 steps, "
    said += "on the way exchanging 4,321 index entries for such as lower its loss more. "
    assert said + "40.9% of the index entries read another feature than at the start." in text
    assert "its indices stay as they were" not in text


def test_charts_hold_the_curves(project: Path, config: Config) -> None:
    page = page_of(project, config)
    read = {a["aria-label"]: json.loads(a["data-read"] or "") for tag, a in page.tags if tag == "svg" and "data-read" in a}
    validation = read["Precision on validation documents"]
    assert validation["t"] == ["step 0", "step 200", "step 400", "step 600", "step 800", "step 825"]
    assert validation["v"][0] == ["41.8", "33.1", "26.4"]  # the start from data
    assert len(read["Loss"]["x"]) == 82
    assert read["Predicted peak by number of labels"]["s"] == [["fixed fan-in", 1], ["dense", 2]]
    exchanged = read["Exchanged at each rewiring"]
    assert exchanged["v"][0] == ["13.5%"]
    meta = read["Loss on meta-labels"]
    assert len(meta["x"]) == 39  # only while the auxiliary objective counts


def test_a_long_text_and_many_labels_are_cut(project: Path, config: Config) -> None:
    row = {"document": 0, "text": "x" * 5000, "labels": list(range(60)), "label_texts": ["y" * 500] * 60}
    row |= {"predicted": list(range(10)), "predicted_texts": [""] * 10, "scores": [1.0] * 10, "hits": [True] * 10}
    pq.write_table(pa.Table.from_pylist([row]), project / "reports/predictions.parquet")
    text = page_of(project, config).text
    assert "x" * 600 + " …" in text
    assert "x" * 601 not in text
    assert "y" * 121 not in text
    assert "and 43 more" in text  # 55 missed, 12 listed
    assert "label 3 (right)" in text  # a label without a text


# run.json ------------------------------------------------------------------------------------------------------------


def test_run_json(project: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "add", "data/corpus/corpus.json", "reports/metrics.json"], cwd=project, check=True)
    subprocess.run(["git", *who, "commit", "-qm", "x"], cwd=project, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, check=True, capture_output=True, text=True)
    monkeypatch.chdir(project)
    run = write_report(project, config)
    assert json.loads((project / "reports/run.json").read_text()) == run
    assert run["commit"] == commit.stdout.strip()
    assert run["dirty"] is False
    assert run["preset"] == "wordnet"
    assert run["corpus"] == "wordnet-near"
    assert run["seed"] == 1
    assert run["settings"]["train"]["head_lr"] == 0.08
    assert run["device"] == "cpu"
    assert run["precision"] == "float32"
    assert run["head_weight_and_index_bytes"] == 12000
    assert run["dense_fp32_bytes"] == 115200
    assert run["dense_to_head_ratio"] == 9.6
    assert run["train_documents_per_second"] == 86.39
    assert run["metrics"]["PSP@5"] == 60.52
    assert run["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run["trained_with"]["torch"] == "2.12.0"
    assert run["stage_seconds"] == SECONDS
    assert run["total_seconds"] == 869.7
    edit(project / "reports/metrics.json", extra=1)  # a stage's own out does not make the tree dirty
    assert write_report(project, config)["dirty"] is False
    edit(project / "data/corpus/corpus.json", extra=1)
    assert write_report(project, config)["dirty"] is True


# broken records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        ("reports/train.json", "[1]", "expected an object"),
        ("reports/metrics.json", "{", "line 1"),
        ("reports/train_curve.csv", "step,loss\n10,1.5\n20\n", "line 3: expected 2 columns, found 1"),
        ("reports/train_curve.csv", "step,loss\n10,abc\n", "line 2: expected a number in loss, found 'abc'"),
        ("reports/predictions.parquet", "not parquet", "not a parquet file"),
        ("data/corpus/corpus.json", '{"name": "x"}', "lacks a value"),
    ],
)
def test_a_broken_record_is_named_and_nothing_is_written(
    project: Path, config: Config, path: str, content: str, told: str
) -> None:
    (project / path).write_text(content)
    with pytest.raises(InputError, match=re.escape(told)) as error:
        write_report(project, config)
    assert path in str(error.value) or "reports/" in str(error.value)
    assert not (project / "reports/report.html").exists()
    assert not (project / "reports/run.json").exists()


def test_rows_reads_the_asked_rows_over_row_groups(project: Path) -> None:
    records = Records(project)
    rows = records.rows("reports/predictions.parquet", [33, 0, 15, 16], ("document",))
    assert [row["document"] for row in rows] == [0, 15, 16, 33]
    draw = records.sample("reports/predictions.parquet", 10, 1)
    assert draw == records.sample("reports/predictions.parquet", 10, 1) != records.sample("reports/predictions.parquet", 10, 2)
    assert len(set(draw)) == 10


# drawing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-5, 12), (3e-5, 4e-4), (0, 2812281), (7, 7), (0, 0)])
def test_linear_ticks_cover_the_data_with_few_even_steps(low: float, high: float) -> None:
    ticks = plots.linear_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


@pytest.mark.parametrize("log", [False, True])
def test_every_point_lies_inside_the_drawing(log: bool) -> None:
    rng = np.random.default_rng(3)
    x, y = np.sort(rng.uniform(1, 3e6, 50)).tolist(), rng.uniform(0.02, 9e4, 50).tolist()
    axis = plots.Axis(label="v", log=log)
    chart = plots.line_chart("t", [plots.Series(name="a", x=x, y=y, colour=1, marks=True)], axis, axis)
    assert chart is not None
    for cx, cy in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', chart.svg):
        assert 0 <= float(cx) <= plots.WIDTH
        assert 0 <= float(cy) <= plots.HEIGHT - plots.BOTTOM + 0.1


def test_gaps_break_a_line_and_an_empty_chart_is_none() -> None:
    axis = plots.Axis(label="v")
    gap = plots.Series(name="a", x=[0, 1, 2, 3, 4], y=[1, 2, None, 3, float("nan")], colour=1)
    chart = plots.line_chart("t", [gap], axis, axis)
    assert chart is not None
    assert chart.svg.count('class="line c1"') == 2
    assert "NaN" not in chart.svg
    assert plots.line_chart("t", [plots.Series(name="a", x=[1], y=[None], colour=1)], axis, axis) is None
    assert plots.column_chart("t", [("a", "")], [plots.Series(name="a", x=[0], y=[None], colour=1)], "x", axis) is None


def test_column_heights_are_proportional_and_whiskers_span_the_interval() -> None:
    series = plots.Series(name="a", x=[0, 1], y=[20.0, 80.0], colour=1, intervals=[(10.0, 30.0), None])
    chart = plots.column_chart("t", [("p", ""), ("q", "")], [series], "x", plots.Axis(label="v", floor=0))
    assert chart is not None
    low, high = (float(height) for height in re.findall(r'height="([\d.]+)"><title', chart.svg))
    assert high / low == pytest.approx(4, rel=0.01)
    top, bottom = sorted(map(float, re.findall(r'class="whisker" d="M[\d.]+ ([\d.]+)V([\d.]+)"', chart.svg)[0]))
    assert bottom - top == pytest.approx(low, rel=0.01)  # 20 units, as high as the first column


def test_thinning_keeps_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=1000).tolist()
    thinned = plots.thin(values, 100)
    assert len(thinned) == 100
    assert np.mean([value for value in thinned if value is not None]) == pytest.approx(np.mean(values))


def test_a_skewed_use_of_features_is_drawn_on_log_axes_without_the_unread() -> None:
    start = [40] * 99 + [0]
    end = [5000] + [20] * 98 + [0]
    curve, moves = figures.fan_in_use(end, start)
    assert curve is not None
    assert moves is not None
    assert ">1,000<" in curve.svg
    assert ">2,000<" not in curve.svg  # a tick of the linear axis
    assert "no label reads" in curve.note
    dots = re.findall(r'class="dots c1" d="([^"]*)"', moves.svg)
    assert dots[0].count("h0") == 99


def test_fan_in_use_of_a_wide_layer_stays_small() -> None:
    use = np.random.default_rng(0).poisson(900, 65536).tolist()
    charts = [chart for chart in figures.fan_in_use(use, use) if chart is not None]
    assert len(charts) == 2
    assert sum(len(chart.svg) for chart in charts) < 60_000
    read = re.search(r'data-read="([^"]*)"', charts[0].svg)
    assert read
    assert json.loads(html.unescape(read[1]))["v"][0][0] == plots.compact(max(use))


# words ---------------------------------------------------------------------------------------------------------------


def test_units() -> None:
    assert [size(value) for value in (512, 11.7 * 1024, 3_629_056, 2**30 * 39.7, None)] == [
        "512 B",
        "11.7 KiB",
        "3.46 MiB",
        "39.7 GiB",
        "\u2013",
    ]
    assert [duration(value) for value in (4.23, 59.96, 125, 3599.7, 11520)] == [
        "4.2 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 00 min",
        "3 h 12 min",
    ]
    assert [plots.compact(value) for value in (0, 0.25, 950, 1500, 67000, 2812281, 3e-4)] == [
        "0",
        "0.25",
        "950",
        "1,500",
        "67k",
        "2.81M",
        "3e-4",
    ]


def test_the_head_in_words() -> None:
    config = Config()
    assert head_in_words(config, {}) == "fixed fan-in: each label reads 32 of 1,536 features, static"
    config.rewiring.recode_at = 0.8
    assert head_in_words(config, {}).endswith("features, recoded at 0.8 of training")
    config.rewiring.refit_epochs = 3
    assert head_in_words(config, {}).endswith("features, recoded and refitted at 0.8 of training")
    config.rewiring.recode_at = 0.0
    config.rewiring.method, config.head.group = "set", 16
    assert head_in_words(config, {"feature_use": [1] * 384}).endswith("32 of 384 features, groups of 16, rewired by SET")
    config.head.kind = "bottleneck"
    assert head_in_words(config, {}) == "dense bottleneck of 64"
