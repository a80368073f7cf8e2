"""Pipeline runs and stores for the tests of tracking."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fanin.config import Config
from fanin.tracking import Run, pipelines
from fanin.tracking.outbox import Journal, Outbox
from fanin.tracking.owner import Owner
from fanin.tracking.store import connect, default_uri

PROJECT = Path(__file__).parent.parent
CORPUS = {"name": "near", "labels": 18_900, "checksum": "c0ffee" * 10 + "abcd", "source": "WordNet", "licence": "WordNet"}
DEAD = Owner(Owner.this().host, 2**22 + 1, 1.0)  # above the highest process number


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty, migrated MLflow database: making one takes seconds, so the files that use it share it."""
    root = tmp_path_factory.getbasetemp() / "empty-store"
    if not root.exists():
        root.mkdir()
        connect(Outbox(root), default_uri(root))
    return root / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder as the working directory; runs are journaled, and sent where a test says so."""
    for name in list(os.environ):
        if name.startswith(("FANIN_", "DVC_", "MLFLOW_TRACKING")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FANIN_TRACKING", "offline")
    monkeypatch.chdir(tmp_path)
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    shutil.copytree(PROJECT / "presets", tmp_path / "presets")
    return tmp_path


@pytest.fixture
def store(project: Path, database: Path) -> Path:
    """The same with an MLflow database."""
    shutil.copy(database, project / "mlflow.db")
    return project


def pipeline_of(owner: Owner = DEAD) -> Journal:
    """A pipeline run whose process is `owner`."""
    return pipelines.open_pipeline(Outbox(), owner, ["dvc", "repro"])


def stage_of(monkeypatch: pytest.MonkeyPatch, pipeline: Journal, name: str, config: Config | None = None) -> Run:
    monkeypatch.setenv(pipelines.PARENT_VARIABLE, pipeline.key)
    return Run.start(name, config or Config())


def client_of(project: Path) -> Any:
    return connect(Outbox(project), default_uri(project))


def runs_of(project: Path) -> dict[str, Any]:
    """MLflow's runs by their fanin.key; fails where two runs share one."""
    runs = client_of(project).search_runs(["1"])
    found = {run.data.tags["fanin.key"]: run for run in runs}
    assert len(found) == len(runs)
    return found


def write_lock(project: Path, stages: Mapping[str, Mapping[str, Any]]) -> None:
    (project / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))  # JSON is YAML
