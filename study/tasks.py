"""What a run of the study is made of, as tasks that one process after the other can do: a stage's function in a folder.

What several runs need (embeddings of a corpus, label clusters, a start) is a task of its own, named by the stage's inputs and
those settings that dvc.yaml lists for the stage, so that runs share just what DVC would restore from its run cache. Label
clusters are made only for runs that read them.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fanin import recoding, training
from fanin.clusters import build_clusters
from fanin.config import Config
from fanin.embeddings import embed_corpus
from fanin.evaluation import evaluate
from fanin.files import read_json
from fanin.model import Classifier
from fanin.start.build import build_start
from fanin.trainer import Trainer
from study import compress
from study.methods import Method
from study.records import digest

SHARED = ("embeddings", "clusters", "start")


@dataclass(frozen=True)
class Task:
    """One thing to do. key: all that its result depends on; needs: the keys of the tasks whose folders it reads, by kind.

    corpus: the folder that holds corpus/ and tokens/; work: where each task has a folder of its own, named by its key.
    """

    kind: str  # embeddings | clusters | start | train | compress
    name: str
    key: str
    config: Config
    corpus: Path
    work: Path
    needs: Mapping[str, str] = field(default_factory=dict)
    method: Method | None = None
    keep_model: bool = False

    @property
    def folder(self) -> Path:
        return self.work / self.key

    def of(self, kind: str) -> Path:
        """The folder of the task of this kind that it needs."""
        return self.work / self.needs[kind]


def shared_tasks(name: str, config: Config, corpus: Path, work: Path) -> dict[str, Task]:
    """The tasks by kind that a training of `config` on the corpus called `name` needs first.

    corpus: its folder, whose name stands for its content in the tasks' keys.
    """
    read_clusters = (config.head.kind == "fixed_fan_in" and config.head.group > 1) or config.auxiliary.enabled
    found: dict[str, Task] = {}

    def add(kind: str, needs: tuple[str, ...], *settings: Any) -> None:
        own = {need: found[need].key for need in needs if need in found}
        key = digest([kind, corpus.name, config.seed, sorted(own.items()), config.train.device, *settings])
        found[kind] = Task(kind, f"{name} {kind}, seed {config.seed}", key, config, corpus, work, own)

    if config.start.source == "data" or config.rewiring.recode_at or read_clusters:
        encoder = config.encoder
        how = [encoder.name, encoder.pooling, encoder.layers, encoder.embed_documents]
        add("embeddings", (), *how, config.train.validation_documents, config.train.precision)
    if read_clusters:
        add("clusters", ("embeddings",), dataclasses.asdict(config.clusters))
    add("start", ("embeddings", "clusters"), dataclasses.asdict(config.start), dataclasses.asdict(config.head))
    return found


def perform(task: Task) -> dict[str, Any]:
    """Do it, in this process; returns figures. The folder of a task that failed is gone."""
    shutil.rmtree(task.folder, ignore_errors=True)  # of a run that was killed
    try:
        return _KINDS[task.kind](task)
    except BaseException:
        shutil.rmtree(task.folder, ignore_errors=True)
        raise
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _embed(task: Task) -> dict[str, Any]:
    return embed_corpus(task.config, task.corpus / "tokens", task.folder)


def _cluster(task: Task) -> dict[str, Any]:
    return build_clusters(task.config, task.corpus / "tokens", task.of("embeddings"), task.folder)


def _start(task: Task) -> dict[str, Any]:
    embeddings, clusters = (task.of(kind) if kind in task.needs else task.folder for kind in ("embeddings", "clusters"))
    return build_start(task.config, task.corpus / "tokens", embeddings, clusters, task.folder)


def _train(task: Task) -> dict[str, Any]:
    """Train and evaluate. Returns what the stages left, as `records.trained` takes it, and the seconds of its parts."""
    own, parts = task.folder, dict[str, float]()
    models, reports, tokens = own / "models", own / "reports", task.corpus / "tokens"
    clusters = task.of("clusters") if "clusters" in task.needs else _no_clusters(tokens, own / "clusters")
    # a run that is cut off is not taken up again here
    config = dataclasses.replace(task.config, train=dataclasses.replace(task.config.train, checkpoint_every=0))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    with _timed(parts):
        summary = training.train(
            config,
            tokens_folder=tokens,
            clusters_folder=clusters,
            embeddings_folder=task.of("embeddings") if "embeddings" in task.needs else own / "embeddings",
            start_folder=task.of("start"),
            labels=task.corpus / "corpus" / "labels.parquet",
            models=models,
            reports=reports,
            checkpoints=own / "checkpoints",
        )
    whole = time.monotonic() - began
    if "recoding" in parts:  # refitting is within it
        parts["recoding"] -= parts.get("refitting", 0.0)
    parts["around"] = whole - sum(parts.values())
    began = time.monotonic()
    evaluate(config, models, tokens, task.corpus / "corpus", reports)
    evaluation = read_json(reports / "evaluation.json")
    parts |= {"ranking": evaluation["ranking_seconds"]}
    parts["scoring"] = time.monotonic() - began - parts["ranking"]
    with open(reports / "validation_curve.csv", newline="", encoding="utf-8") as file:
        curve = list(csv.DictReader(file))
    found = {
        "about": read_json(task.corpus / "corpus" / "corpus.json"),
        "training": summary,
        "evaluation": evaluation,
        "curve": curve,
        "model_bytes": sum(path.stat().st_size for path in models.rglob("*") if path.is_file()),
        "parts": {part: round(seconds, 2) for part, seconds in parts.items()},
    }
    if not task.keep_model:
        shutil.rmtree(own)
    return found


def _compress(task: Task) -> dict[str, Any]:
    """What `records.compressed` takes."""
    assert task.method is not None
    models = task.folder / "models"
    shutil.copytree(task.of("train") / "models", models)
    corpus = task.corpus / "corpus"
    found = compress.evaluated(task.method, task.config, models, task.corpus / "tokens", corpus, task.folder / "reports")
    shutil.rmtree(task.folder)
    return found


_KINDS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "embeddings": _embed,
    "clusters": _cluster,
    "start": _start,
    "train": _train,
    "compress": _compress,
}


def _no_clusters(tokens: Path, folder: Path) -> Path:
    """What the train stage opens where nothing reads it: labels in their own order, all of one cluster."""
    labels = read_json(tokens / "tokens.json")["labels"]
    folder.mkdir(parents=True)
    np.save(folder / "order.npy", np.arange(labels, dtype=np.int32))
    np.save(folder / "meta.npy", np.zeros(labels, np.int32))
    return folder


@contextlib.contextmanager
def _timed(parts: dict[str, float]) -> Iterator[None]:
    """Add up in `parts` the seconds of what the train stage calls."""
    calls: tuple[tuple[Any, str, str], ...] = (
        (Classifier, "build", "building"),
        (Trainer, "_train_step", "steps"),
        (Trainer, "_validate", "validation"),
        (training, "recode_now", "recoding"),
        (recoding, "refit", "refitting"),
        (training, "calibrate", "calibration"),
        (Classifier, "save", "saving"),
    )
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in calls]

    def measured(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            began = time.monotonic()
            try:
                return call(*args, **options)
            finally:
                parts[part] = parts.get(part, 0.0) + time.monotonic() - began

        return wrapper

    try:
        for owner, name, part in calls:
            call = getattr(owner, name)
            bound = isinstance(vars(owner)[name], classmethod)
            setattr(owner, name, staticmethod(measured(call, part)) if bound else measured(call, part))
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)
