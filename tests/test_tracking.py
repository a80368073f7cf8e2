"""Journals on disk, their mirror in MLflow, and servers that are down, hang, or come back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fanin import pipelines, provenance, sender
from fanin.compare import find_runs, report
from fanin.config import Config, load_config
from fanin.files import InputError
from fanin.mirror import Mirror, metric_name
from fanin.outbox import LINK_BYTES, Journal, Outbox
from fanin.owner import Owner, project_root
from fanin.store import Unreachable, connect, default_uri, quiet_mlflow, store_uri
from fanin.tracking import Run, main
from fanin.ui import compare_link, free_port

PROJECT = Path(__file__).parent.parent
CORPUS = {"name": "near", "labels": 18_900, "checksum": "c0ffee" * 10 + "abcd", "source": "WordNet", "licence": "WordNet"}
DEAD = Owner(Owner.this().host, 2**22 + 1, 1.0)  # above the highest process number


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty, migrated MLflow database: making one takes seconds."""
    root = tmp_path_factory.mktemp("store")
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


# Journals


def test_a_torn_line_harms_no_other(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox" / "a")
    journal.append("metrics", values={"x": 1.0}, step=0)
    whole = journal.end_of_whole_lines()
    with open(journal.path, "a") as file:
        file.write('{"event": "metr')  # killed here
    assert [event["event"] for _, event in journal.events()] == ["metrics"]
    assert journal.end_of_whole_lines() == whole
    journal.append("end", status="KILLED")
    assert [event["event"] for _, event in journal.events()] == ["metrics", "end"]
    assert journal.ended("KILLED")


def test_the_end_of_a_long_journal_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox" / "a")
    journal.folder.mkdir(parents=True)
    line = json.dumps({"event": "metrics", "time": 1, "values": {"x": 1.0}, "step": 0}) + "\n"
    journal.path.write_text(line * 5000)
    assert journal.end() is None
    journal.append("end", status="FINISHED")
    journal.append("tags", values={"late": "yes"})
    assert journal.ended("FINISHED")


def test_artifacts_stay_as_they_were_logged(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox" / "a")
    small, large = tmp_path / "small.json", tmp_path / "large.bin"
    small.write_text("first")
    large.write_bytes(b"1" * LINK_BYTES)
    kept = [journal.folder / journal.keep(path, path.name) for path in (small, large)]
    small.write_text("second, in place")
    (tmp_path / "new").write_bytes(b"2" * LINK_BYTES)
    os.replace(tmp_path / "new", large)  # as fanin.files.atomic_path does
    assert kept[0].read_text() == "first"
    assert kept[1].read_bytes() == b"1" * LINK_BYTES
    again = journal.folder / journal.keep(small, small.name)
    assert (again.read_text(), again.name, kept[0].read_text()) == ("second, in place", "small.json", "first")


def test_a_large_artifact_takes_no_second_copy(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox" / "a")
    large = tmp_path / "models" / "head.safetensors"
    large.parent.mkdir()
    large.write_bytes(b"1" * LINK_BYTES)
    kept = journal.folder / journal.keep(large.parent, "models") / large.name
    assert kept.stat().st_ino == large.stat().st_ino


def test_an_owner_is_one_process_and_not_a_later_one_with_its_number() -> None:
    me = Owner.this()
    assert me.alive()
    assert not Owner(me.host, me.pid, me.started - 60).alive()
    assert not DEAD.alive()
    assert me.key(Path("/a")) != me.key(Path("/b"))


def test_root_of_an_experiments_copy_is_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FANIN_ROOT", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert project_root() == tmp_path
    monkeypatch.setenv("FANIN_ROOT", "/elsewhere")
    assert project_root() == Path("/elsewhere")


# Pipeline runs


def test_stages_under_one_dvc_process_find_each_other(project: Path) -> None:
    (project / "stage.py").write_text(
        "import sys\nfrom fanin.stage import run_stage\nrun_stage(sys.argv[1], lambda c, r: None)\n"
    )
    program = project / "dvc"  # what is looked for is the program's name
    calls = f"import subprocess\nfor s in ('corpus', 'tokens'):\n    subprocess.run(['{sys.executable}', 'stage.py', s], check=True)\n"
    program.write_text(calls)
    for _ in range(2):
        subprocess.run([sys.executable, program, "repro"], check=True, cwd=project, timeout=120)
    found = sorted(sorted(journal.folder.name for journal in Outbox.stages(run)) for run in Outbox(project).pipelines())
    assert found == [["corpus", "tokens"], ["corpus", "tokens"]]


def test_a_left_over_parent_variable_does_not_count(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of()
    monkeypatch.setenv(pipelines.PARENT_VARIABLE, pipeline.key)
    assert pipelines.find_pipeline(Outbox()).key == pipeline.key
    pipelines.describe_pipeline(pipeline, Config())
    pipeline.append("tags", values={"fanin.dvc_experiment": "first"})
    monkeypatch.setenv("DVC_EXP_NAME", "second")  # the queue's next experiment
    assert pipelines.find_pipeline(Outbox()).key != pipeline.key
    monkeypatch.setenv("DVC_EXP_NAME", "first")
    pipeline.append("end", status="FINISHED")
    assert pipelines.find_pipeline(Outbox()).key != pipeline.key


def test_run_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FANIN_RUN_NAME", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    config = Config(seed=3)
    assert pipelines.run_name(config) == "wordnet fixed_fan_in K32 seed3"
    config.head.kind = "bottleneck"
    assert pipelines.run_name(config) == "wordnet bottleneck R64 seed3"
    monkeypatch.setenv("DVC_EXP_NAME", "quiet-otter")
    assert pipelines.run_name(config) == "quiet-otter"
    assert sender.experiment_name(["dvc", "exp", "run", "-S", "seed=2", "-n", "two"]) == "two"
    assert sender.experiment_name(["dvc", "repro"]) is None


def test_stage_hashes_follow_command_deps_and_params() -> None:
    def entry(cmd: str = "a", md5: str = "1", seed: int = 1, out: str = "x") -> dict[str, Any]:
        return {
            "cmd": cmd,
            "deps": [{"path": "p", "md5": md5}],
            "params": {"params.yaml": {"seed": seed}},
            "outs": [{"path": "o", "md5": out}],
        }

    def stage_hash(**changed: Any) -> str:
        return provenance.stage_hashes(json.dumps({"stages": {"s": entry(**changed)}}))["s"]

    same = stage_hash()
    assert stage_hash(out="y") == same  # outs are what a stage gives, not what goes in
    assert len({same, stage_hash(cmd="b"), stage_hash(md5="2"), stage_hash(seed=2)}) == 4
    assert provenance.stage_hashes("stages: [") == {}


def test_stage_hashes_leave_out_what_is_out_of_date() -> None:
    stages = {
        "report": {"cmd": "r", "deps": [{"path": "metrics", "md5": "m"}]},
        "evaluate": {"cmd": "e", "deps": [{"path": "model", "md5": "OLD"}], "outs": [{"path": "metrics", "md5": "m"}]},
        "train": {"cmd": "t", "outs": [{"path": "model", "md5": "NEW"}]},
        "memory": {"cmd": "m"},
    }
    assert set(provenance.stage_hashes(json.dumps({"stages": stages}))) == {"train", "memory"}


# The mirror


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
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "environment")][0] == "environment/packages.txt"
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
        patch.setattr("fanin.mirror.connect", slow_connect)
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


# Servers in trouble


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
    began = time.monotonic()
    for number in range(3):
        pipeline = pipeline_of(Owner(DEAD.host, DEAD.pid, float(number)))
        stage_of(monkeypatch, pipeline, "train").end("FINISHED")
    assert time.monotonic() - began < 3
    began = time.monotonic()
    assert main(["sync"]) == 1
    assert time.monotonic() - began < 10
    err = capsys.readouterr().err
    assert f"no answer from {address}" in err
    assert reason in err
    assert "3 run(s) wait" in err
    assert len(Outbox().pipelines()) == 3


def test_a_database_that_is_not_one_is_a_server_in_trouble(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "mlflow.db").write_text("not a database " * 100)
    stage_of(monkeypatch, pipeline_of(), "train").end("FINISHED")
    summary = Mirror(Outbox()).flush()
    assert (len(summary.problems), summary.runs) == (1, [])
    assert len(Outbox().pipelines()) == 1


# The wrapper


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


# Comparing


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
    with pytest.raises(InputError, match="no pipeline run is called 'K64'.*'K32', 'K16'"):
        find_runs(client, ["K64"])


def test_compare_link_is_what_the_ui_reads() -> None:
    link = compare_link("http://127.0.0.1:5000/", ["1"], ["a", "b"])
    assert urllib.parse.unquote_plus(link) == 'http://127.0.0.1:5000/#/compare-runs?runs=["a", "b"]&experiments=["1"]'


# Real processes and servers


@pytest.mark.slow
def test_two_processes_at_once_on_a_fresh_store(project: Path) -> None:
    body = "from fanin.outbox import Outbox\nfrom fanin.store import *\nconnect(Outbox(), default_uri(Outbox().root))\n"
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
