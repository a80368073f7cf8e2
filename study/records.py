"""The study's records: one for each method (or rival) and seed, in benchmarks/results/study-<corpus>-<device>.json."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from fanin import metrics, provenance
from fanin.config import Config, Evaluate
from fanin.evaluation import SPLITS, score
from fanin.files import InputError, read_json, write_json
from study.corpora import WORK, Corpus
from study.methods import Method

RESULTS = Path("benchmarks/results")
FIGURES = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5")
BY_FREQUENCY = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "recall@5")
DATA = ("train_documents", "test_documents", "labels", "labels_seen_once", "labels_per_document", "checksum")
_MIB = 2**20


def device_name() -> str:
    """The GPU's name where there is one, else the processor's with the threads that torch uses."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{provenance.machine()['fanin.cpu']}, {torch.get_num_threads()} threads"


def record_file(corpus: str, folder: Path = RESULTS) -> Path:
    """Where the records of this corpus on this device are."""
    return folder / f"study-{corpus}-{re.sub(r'[^a-z0-9]+', '-', device_name().lower()).strip('-')}.json"


class Records:
    """The records in one file, one a (method, seed); each addition is on disk when `add` returns.

    Several studies may add to one file at the same time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[dict[str, Any]] = []
        self._read()

    def _read(self) -> None:
        self.all = read_json(self.path) if self.path.exists() else []

    def find(self, method: str, seed: int) -> dict[str, Any] | None:
        return next((r for r in self.all if (r["method"], r["seed"]) == (method, seed)), None)

    def add(self, record: dict[str, Any]) -> None:
        """Add a record in place of an older one of the same method and seed."""
        WORK.mkdir(exist_ok=True)
        with open(WORK / f"{self.path.stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            self._read()
            self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        others = [r for r in self.all if (r["method"], r["seed"]) != (record["method"], record["seed"])]
        self.all = sorted([*others, record], key=lambda r: (r["method"], r["seed"]))
        write_json(self.path, self.all)

    def seconds(self, method: str, kind: str) -> float:
        """How long a run of this method may take: the longest of its own, else of its kind, else of all; 0: nobody knows.

        Records of 0 s (a rival that could not be had, an experiment that was there already) tell nothing.
        """
        told = [r for r in self.all if r["wall_seconds"] > 1]
        asked = (("method", method), ("kind", kind))
        own, like = ([r["wall_seconds"] for r in told if r[key] == value] for key, value in asked)
        return max(own or like or [r["wall_seconds"] for r in told], default=0.0)


def quality(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of evaluation.json (or of `scored`) that a record keeps, in per cent, with 95 % intervals."""
    found: dict[str, Any] = {name: evaluation["metrics"][name] for name in FIGURES}
    found["intervals"] = {name: evaluation["intervals"][name] for name in FIGURES if name in evaluation["intervals"]}
    for split in SPLITS:
        of_split = evaluation["splits"][split]
        found[split] = {name: of_split[name] for name in ("labels", *BY_FREQUENCY) if name in of_split}
    return found


def scored(ranked: np.ndarray, corpus: Path, settings: Evaluate) -> dict[str, Any]:
    """Score ranked labels [N, k] of all test documents of a corpus folder exactly as the evaluate stage would.

    Raises InputError where the ranking does not fit the corpus.
    """
    frequency = pq.read_table(corpus / "labels.parquet", columns=["frequency"])["frequency"].to_numpy().astype(np.int64)
    owned = pq.read_table(corpus / "test.parquet", columns=["labels"])["labels"].combine_chunks()
    offsets, true = owned.offsets.to_numpy().astype(np.int64), owned.values.to_numpy()
    if len(ranked) != len(owned) or ranked.max(initial=-1) >= len(frequency):
        raise InputError(f"{len(ranked)} rankings do not fit the {len(owned)} test documents of {corpus}; run the rival again")
    about = read_json(corpus / "corpus.json")
    inverse = metrics.inverse_propensity(frequency, about["train_documents"], settings.propensity_a, settings.propensity_b)
    hits = metrics.match(ranked, offsets, true)
    return score(settings, frequency, inverse, ranked, hits, offsets, true)


def sizes(head_bytes: Mapping[str, int], shared_bytes: int, labels: int, width: int, itemsize: int = 4) -> dict[str, Any]:
    """MiB of the head as stored, of the layers that all labels share, and of the dense layer that both stand in for.

    head_bytes: weights, indices and bias; labels L, width D of the encoder, itemsize of the head's own dtype: the dense layer
    is L x D of these and L biases in float32.
    """
    parts = {name: round(head_bytes[name] / _MIB, 4) for name in ("weights", "indices", "bias")}
    return {
        "head_mib": round(sum(head_bytes[name] for name in parts) / _MIB, 4),
        "head_parts_mib": parts,
        "shared_mib": round(shared_bytes / _MIB, 4),
        "dense_mib": round((labels * width * itemsize + 4 * labels) / _MIB, 4),
    }


def digest(parts: Sequence[Any]) -> str:
    """A hash of all that a result depends on: a record's key."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()


def configuration_of(config: Config) -> dict[str, Any]:
    """The part of a configuration that a result depends on."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("tracking", "memory")}


def trained(
    method: Method,
    corpus: Corpus,
    seed: int,
    config: Config,
    settings: Mapping[str, Any],
    *,
    about: Mapping[str, Any],
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    curve: Iterable[Mapping[str, str]],
    prepare_seconds: float,
    model_bytes: int,
) -> dict[str, Any]:
    """The record of a trained method, from what its stages left: corpus.json, train.json, evaluation.json, the rows of
    validation_curve.csv, the seconds of embeddings, clusters and start, and the bytes of the model folder.

    config: what was run; settings: those over params.yaml that made it.
    """
    itemsize = {"fp32": 4, "bf16": 2, "fp8": 1}[config.head.dtype]
    labels = training["labels"]
    width = training["dense_fp32_bytes"] // (4 * labels)
    return {
        "method": method.name,
        "kind": "trained",
        "corpus": corpus.name,
        "seed": seed,
        **data_facts(about),
        **quality(evaluation),
        **sizes(training["head_bytes"], training["intermediate_bytes"] + training["lexical_bytes"], labels, width, itemsize),
        "model_mib": round(model_bytes / _MIB, 3),
        "train_seconds": training["seconds"],
        "prepare_seconds": round(prepare_seconds, 1) if config.start.source == "data" else 0.0,
        "rank_seconds": evaluation["ranking_seconds"],
        "peak_mib": training.get("peak_allocated_mib") or training["peak_rss_mib"],
        "documents_seen": training["documents"],
        "steps": training["steps"],
        "calibration": training["calibration"],
        "curve": [{name: round(float(value), 3) for name, value in row.items()} for row in curve],
        "settings": dict(settings),
        "test_documents": evaluation["documents"],
        **origin(),
    }


def compressed(
    method: Method,
    parent: Mapping[str, Any],
    *,
    about: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    stored: Mapping[str, int],
    others: int,
    width: int,
) -> dict[str, Any]:
    """The record of a head made small after training. parent: the record of the dense method; stored: bytes of its parts as
    stored; others: those of the model folder's other files; width: the encoder's."""
    same = ("train_seconds", "prepare_seconds", "peak_mib", "documents_seen", "steps")
    return {
        "method": method.name,
        "kind": "compressed",
        "corpus": parent["corpus"],
        "seed": parent["seed"],
        **data_facts(about),
        **quality(evaluation),
        **sizes(stored, round(parent["shared_mib"] * _MIB), about["labels"], width),
        "model_mib": round((others + sum(stored.values())) / _MIB + parent["shared_mib"], 3),
        **{name: parent[name] for name in same},
        "rank_seconds": evaluation["ranking_seconds"],
        "settings": dict(parent["settings"]) | dict(method.settings),
        "test_documents": evaluation["documents"],
        **origin(),
    }


def data_facts(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of corpus.json."""
    return {"data": {name: about[name] for name in DATA}}


def origin() -> dict[str, Any]:
    """Device, versions and commit, for a record."""
    tags = provenance.commit()
    dirty = "-dirty" if tags.get("fanin.git_dirty") == "true" else ""
    versions = provenance.versions() | {"python": provenance.machine()["fanin.python"]}
    return {"device": device_name(), "versions": versions, "commit": tags.get("mlflow.source.git.commit", "unknown") + dirty}
