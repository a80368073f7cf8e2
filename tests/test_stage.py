"""What leaves a stage's process, and how its journal ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

IMPORTS = """import sys, time
from pathlib import Path
from fanin.files import InputError
from fanin.stage import run_stage
"""
PROJECT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with settings, where runs are journaled and not sent."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    shutil.copytree(PROJECT / "presets", tmp_path / "presets")
    return tmp_path


def start(project: Path, body: str) -> subprocess.Popen[str]:
    """Run a stage called `train` whose main has `body`."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    imports = (
        "import sys, time\nfrom pathlib import Path\nfrom fanin.files import InputError\nfrom fanin.stage import run_stage\n"
    )
    (project / "stage.py").write_text(f"{imports}def main(config, run):\n{indented}\nrun_stage('train', main)\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FANIN_", "DVC_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "stage.py"],
        cwd=project,
        env=environment | {"FANIN_TRACKING": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def journal(project: Path) -> list[dict[str, Any]]:
    (path,) = project.glob("outbox/*/train/journal.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def ending(project: Path) -> tuple[str, str]:
    """Status and reason of the stage's run."""
    events = journal(project)
    tags = {key: value for event in events if event["event"] == "tags" for key, value in event["values"].items()}
    assert events[-1]["event"] == "end"
    return events[-1]["status"], tags.get("fanin.reason", "")


def test_success_ends_finished(project: Path) -> None:
    process = start(project, "run.metrics({'loss': 0.5}, 7)\nprint(config.head.kind)")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, "fixed_fan_in"), err
    assert ending(project) == ("FINISHED", "")
    (point,) = [event for event in journal(project) if event["event"] == "metrics" and "loss" in event["values"]]
    assert (point["values"], point["step"]) == ({"loss": 0.5}, 7)


def test_input_error_is_one_line(project: Path) -> None:
    process = start(project, "raise InputError('data/corpus/corpus.json is missing; run dvc repro corpus')")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: data/corpus/corpus.json is missing; run dvc repro corpus" in err.splitlines()
    assert "Traceback" not in err
    assert ending(project) == ("FAILED", "data/corpus/corpus.json is missing; run dvc repro corpus")


def test_unknown_error_keeps_its_traceback(project: Path) -> None:
    process = start(project, "{}['absent']")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in err
    assert "KeyError: 'absent'" in err
    assert ending(project) == ("FAILED", "KeyError: 'absent'")


def test_wrong_settings_open_no_run(project: Path) -> None:
    (project / "params.yaml").write_text("preset: wordnet\nhead:\n  fan_out: 3\n")
    process = start(project, "print('never')")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: params.yaml: head.fan_out is not a setting")
    assert not list(project.glob("outbox/*"))


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")])
def test_signals_let_main_keep_what_it_wants(project: Path, number: signal.Signals, code: int, name: str) -> None:
    body = """
try:
    Path('ready').touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    Path('kept').touch()
    raise
"""
    process = start(project, body)
    wait_for(project / "ready", process)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)  # the terminal and make both pass it on: the checkpoint must not be cut by the second
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (project / "kept").exists()
    assert f"stopped by {name}" in err
    assert ending(project) == ("KILLED", name)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_exit_codes_of_main_count(project: Path) -> None:
    process = start(project, "sys.exit('two words')")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "two words" in err
    assert ending(project)[0] == "FAILED"


def test_an_outbox_that_cannot_be_written_costs_no_run(project: Path) -> None:
    (project / "outbox").write_text("a file where the folder should be")
    process = start(project, "run.metrics({'loss': 1.0})\nPath('done').touch()")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (project / "done").exists()
    assert err.count("warning: tracking") == 1
