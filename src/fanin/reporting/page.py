"""The report: one HTML page that opens offline, and run.json, the same run in figures for programs."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined, UndefinedError

from fanin import provenance
from fanin.config import Config
from fanin.files import InputError, atomic_path, write_json
from fanin.reporting import sections
from fanin.reporting.records import Records

OUTS = ("reports/run.json", "reports/report.html")
HEADLINE = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")
METHODS = {"set": "SET", "rigl": "RigL"}
UNKNOWN = "\u2013"  # en dash, where a figure would stand


def write_report(root: Path, config: Config) -> dict[str, Any]:
    """Write `reports/run.json` and `reports/report.html` under `root` from what the stages left there.

    Returns run.json's content. A file that is missing is named in the page, with the command that makes it; raises
    InputError for one that is broken, naming it.
    """
    records = Records(root)
    run = summary(records, config)
    page = render(records, config, run)
    write_json(root / OUTS[0], run)
    with atomic_path(root / OUTS[1]) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run


def summary(records: Records, config: Config) -> dict[str, Any]:
    """What run.json holds; null where the stage that knows it has not run. Seconds, bytes, metrics in per cent."""
    train, metrics = records.json("reports/train.json"), records.json("reports/metrics.json")
    head = train.get("head_bytes") or {}
    stored = head.get("weights", 0) + head.get("indices", 0) if head else None
    dense = train.get("dense_fp32_bytes")
    commit, machine = provenance.commit(), provenance.machine()
    seconds = records.seconds()
    return {
        "preset": config.preset,
        "corpus": records.json("data/corpus/corpus.json").get("name"),
        "seed": config.seed,
        "settings": dataclasses.asdict(config),
        "versions": {"python": platform.python_version(), **provenance.versions()},
        "trained_with": records.json("models/fanin.json").get("versions", {}),
        "device": train.get("device"),
        "precision": train.get("precision"),
        "machine": {key: machine[f"fanin.{key}"] for key in ("cpu", "cores", "memory_gib", "platform")},
        "commit": commit.get("mlflow.source.git.commit"),
        "dirty": commit["fanin.git_dirty"] == "true" if commit else None,
        "stage_seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 3),
        "train_documents_per_second": train.get("documents_per_second"),
        "head_bytes": head or None,
        "head_weight_and_index_bytes": stored,
        "intermediate_bytes": train.get("intermediate_bytes"),
        "dense_fp32_bytes": dense,
        "dense_to_head_ratio": round(dense / stored, 4) if dense and stored else None,
        "metrics": {name: metrics[name] for name in HEADLINE if name in metrics},
    }


def render(records: Records, config: Config, run: Mapping[str, Any]) -> str:
    """The page as one HTML string without a reference to any other file. run: `summary`'s result."""
    environment = Environment(
        loader=PackageLoader("fanin.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"bytes": size, "duration": duration, "figure": figure, "count": count, "times": times, "setting": setting}
    environment.filters |= {name: _strict(function) for name, function in filters.items()}
    context = {
        "run": run,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "what": head_in_words(config, records.json("reports/train.json")),
        "headline": HEADLINE,
        "train": records.json("reports/train.json"),
        "task": sections.task(records, config),
        "curves": sections.training(records, config),
        "accuracy": sections.accuracy(records, config),
        "memory": sections.memory(records, config),
        "fan_in": sections.fan_in(records, config),
        "examples": sections.examples(records, config),
        "settings": settings(config),
        "stages": sections.stages(run["stage_seconds"]),
        "missing": records.missing,
    }
    try:
        return environment.get_template("report.html.j2").render(context)
    except UndefinedError as error:
        raise InputError(f"reports/: a stage's record lacks a value ({error}); run the stages again (dvc repro)") from None


def _strict(function: Callable[..., str]) -> Callable[..., str]:
    """The filter, but with jinja's own error (it names the value) where a record does not have what it should."""

    def checked(value: Any, *arguments: Any) -> str:
        if isinstance(value, Undefined):
            str(value)  # raises UndefinedError
        return function(value, *arguments)

    return checked


def settings(config: Config) -> list[tuple[str, list[tuple[str, Any, Any, bool]]]]:
    """(section, [(key, value, default, differs from it)]); the top-level settings come as section ""."""
    ours, defaults = dataclasses.asdict(config), dataclasses.asdict(Config())
    top = [(key, value, defaults[key], value != defaults[key]) for key, value in ours.items() if not _is_section(value)]
    rows = [("", top)]
    for section, values in ours.items():
        if _is_section(values):
            base = defaults[section]
            rows.append((section, [(key, value, base[key], value != base[key]) for key, value in values.items()]))
    return rows


def _is_section(value: Any) -> bool:
    return isinstance(value, dict)


def head_in_words(config: Config, train: Mapping[str, Any]) -> str:
    """The head of this run in a few words."""
    head = config.head
    width = len(train.get("feature_use") or []) or head.intermediate
    over = f" of {width:,} features" if width else " features"
    if head.sparse:
        changes = [] if config.rewiring.method == "none" else [f"rewired by {METHODS[config.rewiring.method]}"]
        if config.rewiring.recode_at:
            refitted = " and refitted" if config.rewiring.refit_epochs else ""
            changes.append(f"recoded{refitted} at {config.rewiring.recode_at:g} of training")
        shared = f", groups of {head.group}" if head.group > 1 else ""
        words = f" and {head.lexical} words" if head.lexical else ""
        words += f" (frequent ones a profile of {head.profiles})" if train.get("profiles") else ""
        reads = f"reads {head.inner_fan_in}{over}{words}{shared}, {', '.join(changes) or 'static'}"
        if head.kind == "head_tail":
            return f"split: the most frequent {head.dense_share:.2%} of labels dense; each other label {reads}"
        return f"fixed fan-in: each label {reads}"
    if head.kind == "bottleneck":
        return f"dense bottleneck of {head.bottleneck}"
    return "dense"


def size(value: float | None) -> str:
    """Bytes in binary units: 3_629_000 -> '3.46 MiB'."""
    if value is None:
        return UNKNOWN
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:,.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.3g} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds for people: '4.2 s', '12 min 05 s', '3 h 12 min'."""
    if seconds is None:
        return UNKNOWN
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def figure(value: float | None, digits: int = 1) -> str:
    """A figure with a fixed number of decimals, thousands apart."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A whole number, thousands apart."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def times(value: float | None) -> str:
    """A ratio to three digits."""
    return UNKNOWN if value is None else f"{value:.3g}"


def setting(value: Any) -> str:
    """A setting's value as params.yaml writes it."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
