"""The train stage: from tokens, clusters and a start to a trained model folder and its records."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import resource
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fanin.calibration import calibrate
from fanin.config import Config
from fanin.data.batches import split
from fanin.data.tokens import TokenSet
from fanin.devices import choose_device
from fanin.encoder import choose_precision
from fanin.faults import sole_run
from fanin.files import InputError, atomic_path, read_json, sha256, write_json
from fanin.heads import sparse_part
from fanin.label_order import label_order
from fanin.memory.fits import between_steps, check, job_of, memory_explained
from fanin.model import Classifier, holds_tensors
from fanin.ranks import ALONE, Ranks
from fanin.recoding import recode_now
from fanin.trainer import Log, Trainer

# columns of the curves, in this order; DVC and the report read them
CURVES = {
    "train": ("step", "loss", "meta_loss", "lambda", "encoder_lr", "head_lr", "documents_per_second"),
    "validation": ("step", "P@1", "P@3", "P@5"),
    "rewiring": ("step", "entries", "pruned", "moved", "share"),
}
# settings that change how a run is watched, not what it computes
_WATCHING = ("log_every", "validate_every", "checkpoint_every")
# and where, which changes the last bits alone
_MACHINE = ("processes",)


def train(
    config: Config,
    *,
    tokens_folder: Path = Path("data/tokens"),
    clusters_folder: Path = Path("data/clusters"),
    embeddings_folder: Path = Path("data/embeddings"),
    start_folder: Path = Path("data/start"),
    labels: Path = Path("data/corpus/labels.parquet"),
    models: Path = Path("models"),
    reports: Path = Path("reports"),
    checkpoints: Path = Path("checkpoints"),
    log: Log = lambda metrics, step: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train as `config` says; leaves the model folder, train.json and the curves. Returns train.json's content.

    The checkpoints are removed when all that is on disk. Every one of `ranks` calls this at the same time, with the same
    folders on a disk that all see; the first one writes and logs. Raises InputError for inputs that are missing or do not
    fit the settings, where another run uses `checkpoints`, where the run's plan does not fit, and where memory runs out.
    """
    description = read_json(tokens_folder / "tokens.json")
    device = choose_device(config.train.device)
    with ExitStack() as stack:
        with ranks.agreed(InputError):
            if ranks.leads:
                stack.enter_context(sole_run(checkpoints))
            plan = check(config, description, device, ranks)
        between = between_steps(plan, device, ranks)
        job = job_of(config, description, device, ranks.size)
        stack.enter_context(memory_explained(job, plan, checkpoints))
        tokens = TokenSet.open(tokens_folder / "train.arrow")
        true_documents = len(tokens) - description["label_documents"]  # label documents follow the true ones: never held out
        train_rows, validation_rows = split(true_documents, config.train.held_out(true_documents), config.seed)
        train_rows = np.concatenate([train_rows, np.arange(true_documents, len(tokens))])
        # order.npy too, which only groups read: the fingerprint names both
        meta, _ = (_load(clusters_folder / name, description["labels"]) for name in ("meta.npy", "order.npy"))
        order = label_order(config, tokens_folder, clusters_folder)

        start = start_folder / "head.safetensors"
        classifier = Classifier.build(config, description["labels"], order, ranks=ranks, drawn=not holds_tensors(start))
        classifier.load_start(start)
        classifier.precision = ranks.of_first(choose_precision(config.train.precision, device))
        classifier.to(device)
        use_before = _feature_use(classifier)
        rewired = config.rewiring.method != "none" or config.rewiring.recode_at > 0  # where not, no copy of the index is kept
        sparse = sparse_part(classifier.head)
        index_before = sparse.index.cpu().clone() if rewired and sparse is not None else None

        trainer = Trainer(
            config,
            classifier,
            tokens,
            train_rows,
            validation_rows,
            pad_id=description["pad_id"],
            meta=meta,
            recode=(lambda model: recode_now(model, tokens_folder, embeddings_folder, checkpoints / ".recoding"))
            if config.rewiring.recode_at
            else None,
            checkpoints=checkpoints,
            fingerprint=ranks.of_first(
                _fingerprint(config, tokens_folder, clusters_folder, start_folder) if ranks.leads else ""
            ),
            log=log if ranks.leads else lambda metrics, step: None,
            between=between,
        )
        optimizer_bytes = classifier.head_bytes()["optimizer"]
        trainer.run()
        calibration = None
        if len(validation_rows):
            frequency = tokens.label_frequency(train_rows, classifier.labels)
            calibration = calibrate(classifier, tokens, validation_rows, frequency)
        classifier.save(models, labels)

        head = classifier.head
        summary = {
            "steps": trainer.step,
            "documents": trainer.documents,
            "skipped_batches": trainer.skipped,
            "seconds": round(trainer.seconds, 3),
            "documents_per_second": round(trainer.documents / max(trainer.seconds, 1e-9), 2),
            "batch": config.train.batch * config.train.accumulation,
            "precision": str(classifier.precision).removeprefix("torch."),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "processes": ranks.size,
            "resumed_from": trainer.resumed_from,
            "final_loss": trainer.curves["train"][-1]["loss"] if trainer.curves["train"] else None,
            "validation": trainer.curves["validation"][-1] if trainer.curves["validation"] else None,
            "labels": classifier.labels,
            "features": head.width,
            "head_bytes": classifier.head_bytes() | {"optimizer": optimizer_bytes},
            "intermediate_bytes": sum(p.numel() * p.element_size() for p in classifier.intermediate.parameters())
            if classifier.intermediate is not None
            else 0,
            "lexical_bytes": classifier.lexical.idf.nbytes if classifier.lexical is not None else 0,
            "profiles": classifier.profiles.in_use() if classifier.profiles is not None else 0,
            "dense_fp32_bytes": 4 * classifier.labels * classifier.encoder.width,
            "peak_rss_mib": ranks.most([_peak_rss_mib()])[0],  # of the fullest process
            "feature_use_start": use_before,
            "feature_use": _feature_use(classifier),
            "moved": _moved(classifier, index_before),
            "calibration": calibration,
            "recoding": trainer.curves["recoding"][-1] if trainer.curves["recoding"] else None,
        }
        if device.type == "cuda":
            summary["peak_allocated_mib"] = ranks.most([torch.cuda.max_memory_allocated(device) / 2**20])[0]
        if ranks.leads:
            for curve, columns in CURVES.items():
                _write_curve(reports / f"{curve}_curve.csv", columns, trainer.curves[curve])
            write_json(reports / "train.json", summary)
        trainer.clear()
    return summary


def _load(path: Path, labels: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: {error}; run the clusters stage (dvc repro clusters)") from None
    if array.shape != (labels,):
        raise InputError(f"{path}: holds {array.shape}, but the corpus has {labels} labels; rerun the clusters stage")
    return array


def _fingerprint(config: Config, tokens: Path, clusters: Path, start: Path) -> str:
    """Names what decides a run's numbers: settings and inputs."""
    settings = dataclasses.asdict(config)
    for section in ("evaluate", "memory", "tracking"):
        settings.pop(section)
    for name in (*_WATCHING, *_MACHINE):
        settings["train"].pop(name)
    inputs = [tokens / "train.arrow", clusters / "order.npy", clusters / "meta.npy", start / "head.safetensors"]
    parts = [json.dumps(settings, sort_keys=True), *(sha256(path) for path in inputs)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _feature_use(classifier: Classifier) -> list[int] | None:
    sparse = sparse_part(classifier.head)
    return None if sparse is None else [int(count) for count in classifier.ranks.total(sparse.feature_use().tolist())]


def _moved(classifier: Classifier, before: torch.Tensor | None) -> float | None:
    """The share of index entries that read a feature which their row did not read at the start."""
    sparse = sparse_part(classifier.head)
    if sparse is None:
        return None
    if before is None:  # never rewired
        return 0.0
    new, rows = 0, 4096
    after = sparse.index.cpu()
    for first in range(0, len(before), rows):
        old = before[first : first + rows].to(torch.int32)
        now = after[first : first + rows].to(torch.int32)
        place = torch.searchsorted(old, now).clamp_(max=old.shape[1] - 1)  # rows are ascending
        new += int((old.gather(1, place) != now).sum())
    moved, entries = classifier.ranks.total([new, before.numel()])
    return moved / entries


def _write_curve(path: Path, columns: tuple[str, ...], rows: list[dict[str, float]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _peak_rss_mib() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
