"""The report's sections: what the template shows of each, from the stages' records; escaping is the template's work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fanin.config import Config
from fanin.reporting import figures
from fanin.reporting.records import Records

EXAMPLES = 10
SAMPLE = 7  # their draw: not the run's seed, so that two runs show the same documents
SHOWN_LABELS = 5  # predictions shown of an example
MOST_LABELS = 12  # labels of one document that the page lists
LONGEST_TEXT = 600  # characters of a document that the page shows
LONGEST_LABEL = 120
GROUPS = ("head", "torso", "tail")
HEAD_NAMES = {"fixed_fan_in": "fixed fan-in", "dense": "dense", "bottleneck": "bottleneck", "head_tail": "head/tail split"}
# memory's parts, in the order of the bars: key -> (name, the page's colour)
PARTS = {
    "baseline": ("process", 6),
    "encoder": ("encoder", 1),
    "encoder_optimizer": ("encoder optimiser", 7),
    "activations": ("activations", 3),
    "head_weights": ("head weights", 2),  # and biases
    "indices": ("head indices", 4),
    "head_optimizer": ("head optimiser", 5),
    "buffers": ("gradients, temporaries", 8),  # and the auxiliary branch
}


def task(records: Records, config: Config) -> dict[str, Any]:
    """Counts, three training documents with their labels, and how often labels occur."""
    corpus, tokens = records.json("data/corpus/corpus.json"), records.json("data/tokens/tokens.json")
    path = "data/corpus/train.parquet"
    own = corpus.get("train_documents")  # label documents follow after them
    total = min(records.count(path), own or records.count(path))
    chosen = np.linspace(0, total - 1, 5).astype(int)[1:4].tolist() if total else []
    documents = records.rows(path, chosen, ("text", "labels"))
    names = label_texts(records, (label for document in documents for label in document["labels"]))
    frequency = records.column("data/corpus/labels.parquet", "frequency")
    evaluate = config.evaluate
    return {
        "corpus": corpus,
        "tokens": tokens,
        "documents": [
            {
                "text": shortened(one["text"]),
                "labels": [names.get(label, f"label {label}") for label in one["labels"][:MOST_LABELS]],
                "more": max(0, len(one["labels"]) - MOST_LABELS),
            }
            for one in documents
        ],
        "chart": figures.label_frequency(frequency),
        "unseen": int((frequency == 0).sum()),
        "groups": {
            "head": int((frequency >= evaluate.head_frequency).sum()),
            "torso": int(((frequency > evaluate.tail_frequency) & (frequency < evaluate.head_frequency)).sum()),
            "tail": int((frequency <= evaluate.tail_frequency).sum()),
        },
    }


def training(records: Records, config: Config) -> dict[str, Any]:
    """The curves by step and what the training took."""
    curve = records.table("reports/train_curve.csv")
    validation = records.table("reports/validation_curve.csv") if config.train.validate_every else {}
    start = records.json("data/start/start.json")
    zero_shot = start.get("zero_shot") if isinstance(start.get("zero_shot"), Mapping) else None
    charts = [
        figures.validation(validation, zero_shot),
        *figures.training(curve, {"encoder": config.train.encoder_lr, "head": config.train.head_lr}),
    ]
    return {"charts": [chart for chart in charts if chart is not None], "start": start}


def accuracy(records: Records, config: Config) -> dict[str, Any]:
    """All metrics as a grid with their intervals; labels by group and by frequency bucket."""
    metrics, evaluation = records.json("reports/metrics.json"), records.json("reports/evaluation.json")
    intervals = evaluation.get("intervals") or {}
    splits, buckets = evaluation.get("splits") or {}, evaluation.get("buckets") or []
    groups = [name for name in GROUPS if name in splits]
    charts = []
    for name, title in (("recall@5", "Recall@5 by group of labels"), ("PSP@5", "What each group adds to PSP@5")):
        values = [splits[group].get(name) for group in groups]
        pairs = [_pair(intervals.get(f"{group}/{name}")) for group in groups]
        categories = [(group, f"{splits[group]['labels']:,} labels" if "labels" in splits[group] else "") for group in groups]
        charts.append(figures.by_frequency(title, categories, {name: values}, {name: pairs}, "labels"))
    recalls = {f"recall@{k}": [bucket.get(f"recall@{k}") for bucket in buckets] for k in (5, 100)}
    if buckets:
        categories = [(str(bucket["bucket"]).replace("-", "\u2013"), "") for bucket in buckets]
        title = "Recall by how often a label was seen"
        charts.append(figures.by_frequency(title, categories, recalls, {}, "training documents of the label"))
    return {
        "grid": grid(metrics, intervals),
        "metrics": metrics,
        "intervals": {name: _pair(interval) for name, interval in intervals.items()},
        "documents": evaluation.get("documents"),
        "notes": evaluation.get("notes") or [],
        "charts": [chart for chart in charts if chart is not None],
        "buckets": buckets,
    }


def grid(metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Metrics named `<name>@<k>` as rows by name and columns by k; each cell (value, interval) or None."""
    found: dict[str, dict[int, tuple[float, tuple[float, float] | None]]] = {}
    for key, value in metrics.items():
        name = re.fullmatch(r"(\w+)@(\d+)", key)
        if name:
            found.setdefault(name[1], {})[int(name[2])] = (value, _pair(intervals.get(key)))
    columns = sorted({k for row in found.values() for k in row})
    order = ["P", "nDCG", "PSP", "PSnDCG", "recall"]
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return {"columns": columns, "rows": [(name, [found[name].get(k) for k in columns]) for name in names]}


def memory(records: Records, config: Config) -> dict[str, Any]:
    """Bars of predicted and measured parts, the same as a table, and the curve over numbers of labels; MiB."""
    found = records.json("reports/memory.json")
    bars = [
        {
            "name": HEAD_NAMES.get(run["head"], run["head"]),
            "kind": kind,
            "mib": (sizes := run[f"{kind}_mib"]),
            "parts": [(*PARTS[key], sizes[key]) for key in PARTS if (sizes.get(key) or 0) > 0],
            "total": sizes["peak"],
        }
        for run in found.get("runs", [])
        for kind in ("predicted", "measured")
        if run.get(f"{kind}_mib")
    ]
    known = {key: part for key, part in PARTS.items() if any(bar["mib"].get(key) for bar in bars)}
    scale = found.get("scale", [])
    return {
        "bars": bars,
        "most": max((bar["total"] for bar in bars), default=0),
        "legend": list(known.values()),
        "rows": [(name, [bar["mib"].get(key) for bar in bars]) for key, (name, _) in known.items()],
        "chart": figures.memory_scale(scale, HEAD_NAMES),
        "record": found,
        "errors": [
            (HEAD_NAMES.get(run["head"], run["head"]), run["error_percent"])
            for run in found.get("runs", [])
            if run.get("error_percent") is not None
        ],
        "unmeasured": [HEAD_NAMES.get(run["head"], run["head"]) for run in found.get("runs", []) if not run["measured_mib"]],
        "kept": next((run["allocator_mib"] for run in found.get("runs", []) if run.get("allocator_mib")), None),
    }


def fan_in(records: Records, config: Config) -> dict[str, Any] | None:
    """Which features labels read; None for a head that reads them all."""
    if not config.head.sparse:
        return None
    train = records.json("reports/train.json")
    use = train.get("feature_use") or []
    table = records.table("reports/rewiring_curve.csv") if config.rewiring.method != "none" else {}
    charts = figures.fan_in_use(use, train.get("feature_use_start")) if use else []
    charts.append(figures.rewiring(table))
    ordered = np.sort(np.asarray(use, dtype=np.int64))[::-1]
    top = max(1, len(ordered) // 10)
    return {
        "charts": [chart for chart in charts if chart is not None],
        "inner": config.head.inner_fan_in,
        "words": config.head.lexical,
        "profiles": train.get("profiles"),
        "profile_words": config.head.profiles,
        "features": len(use),
        "unread": int((ordered == 0).sum()),
        "most": int(ordered[0]) if len(ordered) else None,
        "median": float(np.median(ordered)) if len(ordered) else None,
        "top_share": float(100 * ordered[:top].sum() / max(1, ordered.sum())) if len(ordered) else None,
        "moved": train.get("moved"),
        "rewirings": len(table.get("step", [])),
        "recoding": train.get("recoding"),
        "calibration": train.get("calibration"),
        "static": config.rewiring.method == "none" and not config.rewiring.recode_at,
    }


def examples(records: Records, config: Config) -> list[dict[str, Any]]:
    """Test documents drawn at random: their predictions, best first, marked right or wrong, and the labels missed."""
    path = "reports/predictions.parquet"
    found = []
    for row in records.rows(path, records.sample(path, EXAMPLES, SAMPLE)):
        ranks = {label: rank for rank, label in enumerate(row["predicted"], 1)}
        texts = zip(row["labels"], row["label_texts"], strict=True)
        missed = [
            (label_name(text, label), ranks.get(label))
            for label, text in texts
            if ranks.get(label, SHOWN_LABELS + 1) > SHOWN_LABELS
        ]
        predicted = zip(row["predicted"], row["predicted_texts"], row["hits"], row["scores"], strict=True)
        found.append(
            {
                "document": row["document"],
                "text": shortened(row["text"]),
                "predictions": [
                    (label_name(text, label), hit, score) for label, text, hit, score in list(predicted)[:SHOWN_LABELS]
                ],
                "missed": missed[:MOST_LABELS],
                "more": max(0, len(missed) - MOST_LABELS),
            }
        )
    return found


def stages(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(stage, seconds, per cent of the longest)."""
    longest = max(seconds.values(), default=0) or 1
    return [(name, value, 100 * value / longest) for name, value in seconds.items()]


def label_texts(records: Records, labels: Iterable[int]) -> dict[int, str]:
    """Texts of some labels; labels.parquet holds label l in row l."""
    wanted = sorted(set(labels))
    rows = records.rows("data/corpus/labels.parquet", wanted, ("id", "text")) if wanted else []
    return {row["id"]: label_name(row["text"], row["id"]) for row in rows}


def label_name(text: str | None, label: int) -> str:
    """What the page calls a label: its text, cut where it is long, or its number where it has none."""
    return shortened(text, LONGEST_LABEL) if text else f"label {label}"


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, cut at a word where it is long."""
    if len(text) <= longest:
        return text
    cut = text[:longest]
    return (cut.rpartition(" ")[0] or cut) + " …"


def _pair(interval: Any) -> tuple[float, float] | None:
    return (float(interval[0]), float(interval[1])) if interval else None
