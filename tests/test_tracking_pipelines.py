"""Which pipeline run a stage belongs to, and what DVC's lock file says of it."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fanin import provenance
from fanin.config import Config
from fanin.tracking import pipelines, sender
from fanin.tracking.outbox import Outbox
from tracked import database, pipeline_of, project, store  # noqa: F401 (fixtures)


def test_stages_under_one_dvc_process_find_each_other(project: Path) -> None:
    (project / "stage.py").write_text(
        "import sys\nfrom fanin.stage import run_stage\nrun_stage(sys.argv[1], lambda c, r: None)\n"
    )
    program = project / "dvc"  # what is looked for is the program's name
    call = f"subprocess.run(['{sys.executable}', 'stage.py', stage], check=True)"
    program.write_text(f"import subprocess\nfor stage in ('corpus', 'tokens'):\n    {call}\n")
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
