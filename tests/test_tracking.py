"""The mirror of pipeline runs in MLflow, and runs side by side."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from fanin.config import Config, load_config
from fanin.files import InputError
from fanin.tracking import pipelines
from fanin.tracking.__main__ import main
from fanin.tracking.compare import find_runs, report
from fanin.tracking.delivery import metric_name
from fanin.tracking.mirror import Mirror
from fanin.tracking.outbox import Outbox
from fanin.tracking.owner import Owner
from fanin.tracking.store import connect, store_uri
from fanin.tracking.ui import compare_link
from tracked import CORPUS, DEAD, client_of, database, pipeline_of, project, runs_of, stage_of, store, write_lock  # noqa: F401 (fixtures)


def test_a_pipeline_run_arrives_whole(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of()
    (store / "plot.csv").write_text("step,loss\n")
    (store / "reports").mkdir()
    (store / "reports" / "metrics.json").write_text(json.dumps({"P@1": 68.2, "tail": {"PSP@5": 40.0}, "name": "near"}))
    run = stage_of(monkeypatch, pipeline, "train")
    run.dataset(CORPUS)
    for step in range(2500):
        run.metrics({"loss": 1 / (step + 1)}, step)
    run.metrics({"P@1": float("nan")})
    run.artifact(store / "plot.csv", "plots")
    run.end("FINISHED")
    run = stage_of(monkeypatch, pipeline, "evaluate")
    run.end("FINISHED")
    pipelines.close_pipeline(Outbox(), pipeline)

    summary = Mirror(Outbox()).flush()
    assert (summary.problems, summary.runs) == ([], [pipeline.key])
    assert not pipeline.folder.exists()
    runs = runs_of(store)
    parent, train = runs[pipeline.key], runs[f"{pipeline.key}/train"]
    assert set(runs) == {pipeline.key, f"{pipeline.key}/train", f"{pipeline.key}/evaluate"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert train.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.run_name, train.info.run_name) == ("wordnet fixed_fan_in K32 seed1", "train")
    assert parent.data.params["head.fan_in"] == train.data.params["head.fan_in"] == "32"
    assert parent.data.metrics == {"P_at_1": 68.2, "tail/PSP_at_5": 40.0}
    client = client_of(store)
    curve = client.get_metric_history(train.info.run_id, "loss")
    assert [(point.step, point.value) for point in sorted(curve, key=lambda point: point.step)] == [
        (step, 1 / (step + 1)) for step in range(2500)
    ]
    for run_id in (parent.info.run_id, train.info.run_id):
        (data,) = client.get_run(run_id).inputs.dataset_inputs
        assert (data.dataset.name, data.dataset.digest) == ("near", CORPUS["checksum"][:32])
        assert (data.tags[0].key, data.tags[0].value) == ("mlflow.data.context", "training")
    assert [file.path for file in client.list_artifacts(train.info.run_id, "plots")] == ["plots/plot.csv"]
    described = {file.path for file in client.list_artifacts(parent.info.run_id, "environment")}
    assert "environment/packages.txt" in described
    assert {"fanin.preset", "fanin.head", "fanin.cpu", "fanin.version.torch", "fanin.device"} <= set(parent.data.tags)


def test_sending_twice_doubles_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of()
    run = stage_of(monkeypatch, pipeline, "train")
    for step in range(20):
        run.metrics({"loss": float(step)}, step)
    run.dataset(CORPUS)
    assert Mirror(Outbox()).flush().problems == []
    before = runs_of(store)
    for state in pipeline.folder.rglob("state.json"):
        state.unlink()  # as if the sender had died before it could note anything
    for step in range(20, 30):
        run.metrics({"loss": float(step)}, step)
    run.end("FINISHED")
    pipelines.close_pipeline(Outbox(), pipeline)
    assert Mirror(Outbox()).flush().runs == [pipeline.key]
    after = runs_of(store)
    assert {key: run.info.run_id for key, run in after.items()} == {key: run.info.run_id for key, run in before.items()}
    train = after[f"{pipeline.key}/train"]
    curve = client_of(store).get_metric_history(train.info.run_id, "loss")
    assert sorted(point.step for point in curve) == list(range(30))
    assert len(train.inputs.dataset_inputs) == 1


def test_a_lost_server_gets_everything_again(store: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    pipeline = pipeline_of()
    stage_of(monkeypatch, pipeline, "train").end("FINISHED")
    pipelines.close_pipeline(Outbox(), pipeline)
    assert main(["sync"]) == 0
    shutil.copy(database, store / "mlflow.db")  # the store is lost
    assert main(["sync"]) == 0
    assert client_of(store).get_experiment_by_name("fanin") is None
    assert main(["sync", "--again"]) == 0
    assert set(runs_of(store)) == {pipeline.key, f"{pipeline.key}/train"}


def test_a_store_that_is_lost_during_a_run_gets_it_from_the_beginning(
    store: Path, monkeypatch: pytest.MonkeyPatch, database: Path
) -> None:
    pipeline = pipeline_of()
    run = stage_of(monkeypatch, pipeline, "train")
    run.metrics({"loss": 2.0}, 1)
    assert Mirror(Outbox()).flush().problems == []
    shutil.copy(database, store / "mlflow.db")
    run.metrics({"loss": 1.0}, 2)
    run.end("FINISHED")
    pipelines.close_pipeline(Outbox(), pipeline)
    assert Mirror(Outbox()).flush().runs == [pipeline.key]
    train = runs_of(store)[f"{pipeline.key}/train"]
    curve = client_of(store).get_metric_history(train.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in curve) == [(1, 2.0), (2, 1.0)]


def test_a_run_in_trouble_does_not_hold_up_the_next(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pipeline_of(), pipeline_of(Owner(DEAD.host, DEAD.pid, 2.0))
    for pipeline in (first, second):
        stage_of(monkeypatch, pipeline, "train").end("FINISHED")
        pipelines.close_pipeline(Outbox(), pipeline)
    (journal,) = Outbox.stages(first)
    with open(journal.path, "a") as file:
        file.write('{"event": "metrics", "time": 1, "values": 7}\n')  # damaged
    summary = Mirror(Outbox()).flush()
    assert summary.runs == [second.key]
    assert first.key in summary.problems[0]


def test_a_server_that_has_moved_gets_everything(store: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    pipeline = pipeline_of()
    stage_of(monkeypatch, pipeline, "train").end("FINISHED")
    pipelines.close_pipeline(Outbox(), pipeline)
    assert main(["sync"]) == 0
    shutil.copy(database, store / "other.db")
    assert main(["sync", "--again", "--to", "sqlite:///other.db"]) == 0
    runs = connect(Outbox(), f"sqlite:///{store}/other.db").search_runs(["1"])
    assert {(run.data.tags["fanin.key"], run.info.status) for run in runs} == {
        (pipeline.key, "FINISHED"),
        (f"{pipeline.key}/train", "FINISHED"),
    }


def test_an_entry_that_is_refused_keeps_no_other_back(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of()
    run = stage_of(monkeypatch, pipeline, "train")
    assert Mirror(Outbox()).flush().problems == []
    run.params({"head.fan_in": 64, "extra": "x"})  # a param cannot change
    run.artifact(store / "absent.csv")
    run.metrics({"loss": 1.0}, 1)
    run.end("FINISHED")
    pipelines.close_pipeline(Outbox(), pipeline)
    assert Mirror(Outbox()).flush().runs == [pipeline.key]
    train = runs_of(store)[f"{pipeline.key}/train"]
    assert (train.data.params["head.fan_in"], train.data.params["extra"]) == ("32", "x")
    assert (train.data.metrics["loss"], train.info.status) == (1.0, "FINISHED")


def test_a_stage_that_dvc_restores_is_found_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"cmd": "python pipeline/train.py", "deps": [{"path": "d", "md5": "1"}], "outs": [{"path": "m", "md5": "2"}]}
    evaluate = {"cmd": "python pipeline/evaluate.py", "deps": [{"path": "m", "md5": "2"}], "params": {"params.yaml": {"k": 5}}}
    first = pipeline_of()
    for name in ("train", "evaluate"):
        stage_of(monkeypatch, first, name).end("FINISHED")
    write_lock(store, {"train": train, "evaluate": evaluate})
    pipelines.close_pipeline(Outbox(), first)
    second = pipeline_of(Owner(DEAD.host, DEAD.pid, 2.0))
    stage_of(monkeypatch, second, "evaluate").end("FINISHED")
    write_lock(store, {"train": train, "evaluate": evaluate | {"params": {"params.yaml": {"k": 10}}}})
    pipelines.close_pipeline(Outbox(), second)
    assert len(Mirror(Outbox()).flush().runs) == 2
    runs = runs_of(store)
    tags = runs[second.key].data.tags
    assert tags["fanin.stage.train"] == runs[f"{first.key}/train"].info.run_id
    assert tags["fanin.stage.evaluate"] == runs[f"{second.key}/evaluate"].info.run_id
    assert f"{second.key}/train" not in runs


def test_dvc_lock_from_before_a_stages_end_says_nothing_about_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lock(project, {"train": {"cmd": "an earlier run's"}})
    os.utime(project / "dvc.lock", (time.time() - 60,) * 2)
    pipeline = pipeline_of()
    stage_of(monkeypatch, pipeline, "train").end("FINISHED")
    pipelines.record_stage_hashes(Outbox(), pipeline)
    (train,) = Outbox.stages(pipeline)
    assert "fanin.stage_hash" not in train.tags()
    os.utime(project / "dvc.lock", (time.time() + 1,) * 2)
    pipelines.record_stage_hashes(Outbox(), pipeline)
    assert "fanin.stage_hash" in train.tags()


def test_a_run_that_was_killed_is_marked_by_the_next_sync(store: Path) -> None:
    body = "import os, signal\nfrom fanin.config import Config\nfrom fanin.tracking import Run\n"
    body += "run = Run.start('train', Config())\nrun.metrics({'loss': 1.0}, 1)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    process = subprocess.run([sys.executable, "-c", body], cwd=store, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert main(["sync"]) == 0
    runs = runs_of(store)
    assert sorted((run.info.run_name, run.info.status) for run in runs.values()) == [
        ("train", "KILLED"),
        ("wordnet fixed_fan_in K32 seed1", "KILLED"),
    ]


def test_stages_that_begin_during_a_pass_are_not_left_behind(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that takes as long as the rest of the pipeline run must not take it for sent."""
    pipeline = pipeline_of()
    stage_of(monkeypatch, pipeline, "train").end("FINISHED")

    def slow_connect(outbox: Outbox, uri: str) -> Any:
        stage_of(monkeypatch, pipeline, "evaluate").end("FINISHED")
        write_lock(store, {"evaluate": {"cmd": "e"}})
        pipelines.close_pipeline(outbox, pipeline)
        return connect(outbox, uri)

    with monkeypatch.context() as patch:
        patch.setattr("fanin.tracking.mirror.connect", slow_connect)
        assert Mirror(Outbox()).flush().runs == []
    assert Mirror(Outbox()).flush().runs == [pipeline.key]
    runs = runs_of(store)
    assert runs[pipeline.key].data.tags["fanin.stage.evaluate"] == runs[f"{pipeline.key}/evaluate"].info.run_id


def test_metric_names() -> None:
    assert metric_name("PSP@5") == "PSP_at_5"
    assert metric_name("tail/P@1 (%)") == "tail/P_at_1 ___"


def test_the_environment_names_the_server_before_the_settings(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.tracking.uri = "http://settings:1"
    first, second = pipeline_of(), pipeline_of(Owner(DEAD.host, DEAD.pid, 2.0))
    pipelines.describe_pipeline(first, config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:2")
    pipelines.describe_pipeline(second, config)
    named = [(journal.last("describe") or {})["uri"] for journal in (first, second)]
    assert named == ["http://settings:1", "http://environment:2"]
    assert store_uri(Outbox(), None) == f"sqlite:///{project}/mlflow.db"
    assert store_uri(Outbox(), "sqlite:///runs.db") == f"sqlite:///{project}/runs.db"


def test_compare(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "reports").mkdir()
    for number, fan_in in enumerate((16, 32)):
        (store / "reports" / "metrics.json").write_text(json.dumps({"P@1": 60.0 + fan_in}))
        config = load_config()
        config.head.fan_in = fan_in
        monkeypatch.setenv("FANIN_RUN_NAME", f"K{fan_in}")
        pipeline = pipeline_of(Owner(DEAD.host, DEAD.pid, float(number)))
        stage_of(monkeypatch, pipeline, "evaluate", config).end("FINISHED")
        pipelines.close_pipeline(Outbox(), pipeline)
    Mirror(Outbox()).flush()
    client = client_of(store)
    runs = find_runs(client, ["K16", "K32"])
    lines = [line.split() for line in report(runs).splitlines()]
    assert ["head.fan_in", "16", "32"] in lines
    assert ["P_at_1", "76", "92", "+16"] in lines
    assert not any(line[:1] == ["seed"] for line in lines)
    latest = find_runs(client, [])
    assert [run.info.run_name for run in latest] == ["K16", "K32"]
    assert find_runs(client, [runs[1].info.run_id[:8]])[0].info.run_id == runs[1].info.run_id
    with pytest.raises(InputError, match=r"no pipeline run is called 'K64'.*'K32', 'K16'"):
        find_runs(client, ["K64"])


def test_compare_link_is_what_the_ui_reads() -> None:
    link = compare_link("http://127.0.0.1:5000/", ["1"], ["a", "b"])
    assert urllib.parse.unquote_plus(link) == 'http://127.0.0.1:5000/#/compare-runs?runs=["a","b"]&experiments=["1"]'
