"""Tracking servers that are down, hang or come back; the wrapper and the sender as real processes."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fanin.tracking import pipelines
from fanin.tracking.__main__ import main
from fanin.tracking.mirror import Mirror
from fanin.tracking.outbox import Outbox
from fanin.tracking.owner import Owner
from fanin.tracking.store import Unreachable, connect, quiet_mlflow
from fanin.tracking.ui import free_port
from tracked import DEAD, client_of, database, pipeline_of, project, runs_of, stage_of, store  # noqa: F401 (fixtures)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def test_a_server_that_never_answers_costs_seconds(
    project: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_waits(silent_server, monkeypatch, capsys, "timed out")


def test_a_server_that_is_down_costs_seconds(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_waits(f"http://127.0.0.1:{free_port(20000)}", monkeypatch, capsys, "refused")


def check_waits(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    """Three pipeline runs: none is delayed, one request finds out, nothing is lost."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    calls: list[object] = []
    really = socket.socket.connect

    def counted(own: socket.socket, where: Any) -> None:
        calls.append(where)
        really(own, where)

    monkeypatch.setattr(socket.socket, "connect", counted)
    for number in range(3):
        pipeline = pipeline_of(Owner(DEAD.host, DEAD.pid, float(number)))
        stage_of(monkeypatch, pipeline, "train").end("FINISHED")
    assert not calls  # a run waits for nobody
    assert main(["sync"]) == 1
    assert len(calls) == 1  # and sync asks once, for all three
    err = capsys.readouterr().err
    assert f"not sent to {address}" in err
    assert reason in err
    assert "3 run(s) wait" in err
    assert len(Outbox().pipelines()) == 3


def test_a_database_that_is_not_one_is_a_server_in_trouble(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "mlflow.db").write_text("not a database " * 100)
    stage_of(monkeypatch, pipeline_of(), "train").end("FINISHED")
    summary = Mirror(Outbox()).flush()
    assert (len(summary.problems), summary.runs) == (1, [])
    assert len(Outbox().pipelines()) == 1


def test_an_experiment_made_through_a_server_is_left_to_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client_of(store).create_experiment("fanin", artifact_location="mlflow-artifacts:/1")
    stage_of(monkeypatch, pipeline_of(), "train").end("FINISHED")
    (problem,) = Mirror(Outbox()).flush().problems
    assert "experiment 'fanin' was made through a server" in problem
    assert len(Outbox().pipelines()) == 1


def wrap(project: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fanin.tracking", "run", "--", *words]
    return subprocess.Popen(command, cwd=project, env=os.environ | environment, stdout=subprocess.PIPE, text=True)


STAGE = "import sys, time\nfrom pathlib import Path\nfrom fanin.stage import run_stage\n"


def test_the_wrapper_passes_the_exit_code_on_and_closes(project: Path) -> None:
    (project / "stage.py").write_text(STAGE + "def main(config, run):\n    sys.exit(3)\nrun_stage('train', main)\n")
    process = wrap(project, sys.executable, "stage.py", FANIN_RUN_NAME="mine")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert out.startswith("tracking: run 'mine' is in ")
    (pipeline,) = Outbox().pipelines()
    (train,) = Outbox.stages(pipeline)
    assert pipeline.ended("FAILED")
    assert train.ended("FAILED")


def test_a_command_that_changes_nothing_leaves_no_run(project: Path) -> None:
    process = wrap(project, "true")
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert Outbox().pipelines() == []
    process = wrap(project, "no-such-program")
    process.communicate(timeout=60)
    assert process.returncode == 127


def test_sigterm_of_the_wrapper_reaches_the_stage(project: Path) -> None:
    body = "def main(config, run):\n    Path('ready').touch()\n    time.sleep(60)\nrun_stage('train', main)\n"
    (project / "stage.py").write_text(STAGE + body)
    process = wrap(project, "sh", "-c", f"{sys.executable} stage.py; exit $?")
    until = time.monotonic() + 60
    while not (project / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    (pipeline,) = Outbox().pipelines()
    assert pipeline.ended("KILLED")


@pytest.mark.slow
def test_two_processes_at_once_on_a_fresh_store(project: Path) -> None:
    body = "from fanin.tracking.outbox import Outbox\nfrom fanin.tracking.store import *\n"
    body += "connect(Outbox(), default_uri(Outbox().root))\n"
    both = [subprocess.Popen([sys.executable, "-c", body], cwd=project) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]


@pytest.mark.slow
def test_the_sender_mirrors_while_a_stage_runs_and_then_ends(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FANIN_TRACKING")
    body = STAGE + "def main(config, run):\n    run.metrics({'loss': 1.0}, 1)\n    time.sleep(40)\nrun_stage('train', main)\n"
    (store / "stage.py").write_text(body)
    stage = subprocess.Popen([sys.executable, "stage.py"], cwd=store)
    try:
        until = time.monotonic() + 38
        while not any("loss" in run.data.metrics for run in client_of(store).search_runs(["1"])):
            assert time.monotonic() < until
            time.sleep(1)
        assert stage.poll() is None  # a live curve
        assert stage.wait(timeout=60) == 0
        until = time.monotonic() + 60
        while Outbox().pipelines():
            assert time.monotonic() < until
            time.sleep(0.5)
        assert {run.info.status for run in runs_of(store).values()} == {"FINISHED"}
        until = time.monotonic() + 20
        while True:
            with Outbox().lock("sender", wait=False) as free:
                if free:
                    break
            assert time.monotonic() < until, "the sender outlives its work"
            time.sleep(0.5)
    finally:
        stage.kill()


@pytest.mark.slow
def test_a_server_that_comes_back_gets_what_waited(project: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    port = free_port(21000)
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    pipeline = pipeline_of()
    run = stage_of(monkeypatch, pipeline, "train")
    run.metrics({"loss": 2.0}, 1)
    (project / "plot.csv").write_text("x")
    run.artifact(project / "plot.csv", "plots")
    run.end("FINISHED")
    pipelines.close_pipeline(Outbox(), pipeline)
    assert main(["sync"]) == 1

    shutil.copy(database, project / "server.db")
    quiet_mlflow()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{project}/server.db",
        "--workers",
        "1",
    ]
    command += ["--artifacts-destination", str(project / "served"), "--host", "127.0.0.1", "--port", str(port)]
    with open(project / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=project, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, (project / "server.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.5)
        assert main(["sync"]) == 0
        client = connect(Outbox(), address)
        found = {run.data.tags["fanin.key"]: run for run in client.search_runs(["1"])}
        train = found[f"{pipeline.key}/train"]
        assert (train.data.metrics["loss"], train.info.status) == (2.0, "FINISHED")
        assert [file.path for file in client.list_artifacts(train.info.run_id, "plots")] == ["plots/plot.csv"]
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        with pytest.raises(Unreachable):
            connect(Outbox(), address)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
