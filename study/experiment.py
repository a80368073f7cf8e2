"""A trained method's run: one DVC experiment in a copy of the project, its record read from what it left.

Stages that several methods share (corpus, tokens, embeddings, and a start of the same head) run once: DVC restores
them from its run cache. Every run is an MLflow run too, with the study's tags.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fanin import provenance
from fanin.files import InputError
from fanin.tracking.pipelines import NAME_VARIABLE, TAGS_VARIABLE
from study.corpora import WORK, Corpus
from study.methods import Method
from study.processes import run_group
from study.records import trained
from study.tracking import run_name, study_tags

TARGET = "evaluate"  # the last stage that a record needs
PREPARING = ("embeddings", "clusters", "start")  # what a start from data costs beside training


def run(method: Method, corpus: Corpus, seed: int, key: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run the experiment unless it is there already (the study may have been killed before it took the record).

    settings: over the corpus's and the method's. Raises InputError where the experiment fails, with the end of its log.
    """
    name = f"study-{corpus.name}-{method.name.replace('_', '-')}-s{seed}-{key[:8]}"
    overrides = corpus.settings | dict(method.settings) | dict(settings) | {"seed": seed}
    began = time.monotonic()
    revision = find(name)
    if revision is None:
        log = WORK / corpus.name / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            code = run_group(_command(name, corpus, overrides), file, _environment(method, corpus, seed))
        revision = find(name)
        if code or revision is None:
            ending = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-12:])
            raise InputError(
                f"{method.name}, seed {seed}: dvc ended with exit code {code}; the whole of it is in {log}:\n  {ending}"
            )
    elapsed = time.monotonic() - began
    return read(method, corpus, seed, revision, overrides) | {"experiment": name, "wall_seconds": round(elapsed, 1)}


def find(name: str) -> str | None:
    """The commit of the DVC experiment of this name."""
    for line in (provenance.git("for-each-ref", "--format=%(refname) %(objectname)", "refs/exps") or "").splitlines():
        reference, commit = line.split()
        if reference.rsplit("/", 1)[-1] == name:
            return commit
    return None


def read(method: Method, corpus: Corpus, seed: int, revision: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a finished experiment, from its reports."""
    seconds = [_json(revision, f"reports/stages/{stage}.json")["seconds"] for stage in PREPARING]
    return trained(
        method,
        corpus,
        seed,
        corpus.config(dict(overrides)),
        overrides,
        about=_json(revision, "data/corpus/corpus.json"),
        training=_json(revision, "reports/train.json"),
        evaluation=_json(revision, "reports/evaluation.json"),
        curve=csv.DictReader(io.StringIO(_text(revision, "reports/validation_curve.csv"))),
        prepare_seconds=sum(seconds),
        model_bytes=_model_bytes(revision),
    )


def _command(name: str, corpus: Corpus, overrides: Mapping[str, Any]) -> list[str]:
    sets = [word for key, value in overrides.items() for word in ("-S", f"{key}={_plain(value)}")]
    copied = [word for path in corpus.ignored_files() for word in ("--copy-paths", path)]
    dvc = ["dvc", "exp", "run", "--temp", "--force", "--name", name, *copied, *sets, TARGET]
    # --force only replaces an experiment of this name that git has and `find` does not: a broken one
    return [sys.executable, "-m", "fanin.tracking", "run", "--", sys.executable, "-m", *dvc]


def _environment(method: Method, corpus: Corpus, seed: int) -> dict[str, str]:
    own = {NAME_VARIABLE: run_name(method, corpus, seed), TAGS_VARIABLE: json.dumps(study_tags(method, corpus, seed))}
    # dvc starts `python`: the one of this environment
    return os.environ | own | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _plain(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)


def _model_bytes(revision: str) -> int:
    """Bytes of the model folder (encoder and head), from the experiment's dvc.lock."""
    lock = yaml.safe_load(provenance.git("show", f"{revision}:dvc.lock") or "")
    outs = (out for stage in lock["stages"].values() for out in stage.get("outs", []))
    return int(next(out["size"] for out in outs if out["path"] == "models"))


def _text(revision: str, path: str) -> str:
    import dvc.api  # a third of a second, and only where a record is taken

    return str(dvc.api.read(path, rev=revision))


def _json(revision: str, path: str) -> Any:
    return json.loads(_text(revision, path))


def fetch(revision: str, path: str, target: Path) -> None:
    """A folder that an experiment left, such as its model, from DVC's cache, as `target`. Raises InputError if it is gone."""
    from dvc.api import DVCFileSystem
    from dvc_data.index import DataIndexError

    try:
        DVCFileSystem(".", rev=revision).get(path, str(target), recursive=True)
    except (OSError, DataIndexError) as error:
        raise InputError(
            f"{path} of experiment {revision[:12]} is no longer in DVC's cache ({error}); remove its record, and it runs again"
        ) from error
