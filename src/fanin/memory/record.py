"""The memory stage: predicted and measured peaks of the training step, for this run's head and for a dense layer."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fanin.config import Config
from fanin.devices import choose_device
from fanin.encoder import choose_precision, load_description, load_tokenizer
from fanin.files import InputError, atomic_path, read_json, write_json
from fanin.memory.jobs import MIB, Job, available, measure_all
from fanin.memory.plan import PARTS, head_bytes
from fanin.memory.shapes import EncoderShape
from fanin.profiles import profile_count

MEASURED_LABELS = 200_000  # sizes of memory.scale_labels above it are predicted only
RUN_SHARE, SCALE_SHARE = 0.9, 0.5  # of free memory: what a plan may take to be measured


def record(config: Config, *, tokens_folder: Path = Path("data/tokens"), reports: Path = Path("reports")) -> dict[str, Any]:
    """Predict and measure as `config` says; leaves memory.json and memory_scale.csv in `reports`. Returns memory.json.

    A rival or a scale size whose plan does not fit into free memory is predicted only. Raises InputError where the
    encoder is missing, or where this run's own step does not fit, naming the sizes.
    """
    description = _description(tokens_folder / "tokens.json")
    load_tokenizer(config.encoder.name, description["max_length"])  # its errors name the setting
    device = choose_device(config.train.device)
    shape = EncoderShape.of(load_description(config.encoder.name), config.encoder.hidden_dropout)
    precision = choose_precision(config.train.precision, device)

    def job(settings: Config, labels: int) -> Job:
        tokens = description["max_length"]
        return Job(config=settings, shape=shape, labels=labels, tokens=tokens, device=device, precision=precision)

    heads = {"this run": config} if config.head.kind == "dense" else {"this run": config, "dense": dense_rival(config)}
    runs = {role: job(settings, description["labels"]) for role, settings in heads.items()}
    scale = [job(settings, labels) for labels in sorted(set(config.memory.scale_labels)) for settings in heads.values()]
    room = available(device)
    own = runs["this run"]
    if own.plan().peak > room:
        raise own.too_large("this run does not fit", room)
    rivals = [other for other in runs.values() if other is not own and other.plan().peak <= RUN_SHARE * room]
    larger = [item for item in scale if item.labels <= MEASURED_LABELS and item.plan().peak <= SCALE_SHARE * room]
    jobs = [own, *rivals, *larger]
    measured = dict(zip(jobs, measure_all(jobs, config.memory.steps, 1 + len(rivals), room), strict=True))

    baseline = measured[own]["baseline"]
    sizes = {"this": _weights(own), "dense": _weights(job(dense_rival(config), own.labels))}
    content: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch": config.train.batch,
        "accumulation": config.train.accumulation,
        "tokens": own.tokens,
        "dtype": str(precision).removeprefix("torch."),
        "encoder": config.encoder.name,
        "runs": [_run(item, role, measured.get(item), baseline) for role, item in runs.items()],
        "scale": [_scale(item, measured.get(item), baseline) for item in scale],
        "head_bytes": sizes,
        "ratio": sizes["dense"] / sizes["this"],
    }
    write_json(reports / "memory.json", content)
    with atomic_path(reports / "memory_scale.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("labels", "head", "predicted_mib"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(content["scale"])
    return content


def dense_rival(config: Config) -> Config:
    """The same run with a dense float32 head straight on the encoder, its momentum as it was."""
    return dataclasses.replace(
        config,
        head=dataclasses.replace(config.head, kind="dense", dtype="fp32", group=1, intermediate=0, activation="linear"),
        rewiring=dataclasses.replace(config.rewiring, method="none"),
        auxiliary=dataclasses.replace(config.auxiliary, enabled=False),
    )


def _run(job: Job, role: str, measured: Mapping[str, Any] | None, baseline: int) -> dict[str, Any]:
    """One entry of `runs`. The baseline is measured, never predicted, so both columns hold the same."""
    head = job.config.head
    plan = job.plan(measured["baseline"] if measured else baseline)
    row: dict[str, Any] = {
        "head": head.kind,
        "role": role,
        "labels": job.labels,
        "features": job.features,
        "fan_in": head.fan_in if head.sparse else None,
        "group": head.group if head.sparse else None,
        "predicted_mib": _mib(plan.parts() | {"peak": plan.peak}),
        "predicted_phase": plan.phase,
        "predicted_phases_mib": _mib({name: plan.resident + phase.total for name, phase in plan.phases.items()}),
        "measured_mib": None,
        "error_percent": None,
    }
    if measured is not None:
        row |= {
            "measured_mib": _mib({part: measured[part] for part in (*PARTS, "peak")}),
            "measured_phase": measured["phase"],
            "measured_phases_mib": _mib(measured["phases"]),
            "error_percent": round(100 * (plan.peak / measured["peak"] - 1), 2),
        }
        row |= {
            f"{name}_mib": size for name, size in _mib({k: measured[k] for k in ("saved", "allocator", "reserved")}).items()
        }
    return row


def _scale(job: Job, measured: Mapping[str, Any] | None, baseline: int) -> dict[str, Any]:
    """One entry of `scale`: predicted, and measured where that is cheap."""
    plan = job.plan(baseline)
    sizes = _mib({"predicted": plan.peak, "measured": measured["peak"] if measured else None})
    return {
        "labels": job.labels,
        "head": job.config.head.kind,
        "predicted_mib": sizes["predicted"],
        "parts_mib": _mib(plan.parts()),
        "measured_peak_mib": sizes["measured"],
    }


def _weights(job: Job) -> int:
    """Bytes of the trained head's weights and indices; the biases are the same in every head."""
    head, profiles = job.config.head, profile_count(job.config.head, job.labels)
    lexical = job.features - job.inner
    sizes = head_bytes(head, job.labels, job.features, momentum=False, profiles=profiles, lexical=lexical)
    return sizes["weights"] + sizes["indices"]


def _mib(sizes: Mapping[str, int | None]) -> dict[str, float | None]:
    return {name: None if size is None else round(size / MIB, 2) for name, size in sizes.items()}


def _description(path: Path) -> dict[str, Any]:
    description = read_json(path)
    for key in ("labels", "max_length"):
        if not isinstance(description, dict) or not isinstance(description.get(key), int) or description[key] < 1:
            raise InputError(f"{path}: no number of {key} in it; rerun the tokens stage (dvc repro tokens)")
    return description
