"""What the study runs and in which order: seeds round-robin, resumable, within the budget; failures stay alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fanin.files import InputError
from study import loop
from study.arguments import budget, setting
from study.corpora import CORPORA
from study.loop import Job, Study
from study.methods import Method
from study.records import Records
from study.rival import Unavailable

ROOT = Path(__file__).resolve().parents[1]
NEAR = CORPORA["near"]
METHODS = [
    Method("tfidf_knn", "a rival", "rival"),
    Method("one", "first", "trained", settings={"head.fan_in": 12}),
    Method("two", "second", "trained", settings={"head.fan_in": 16}),
    Method("small", "compressed", "compressed", of="one", settings={"compress": "prune", "K": 3}),
    Method("extra", "an ablation", "trained", tier="ablation", settings={"head.fan_in": 10}),
]


class Clock:
    """Time that passes only where a run takes some."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loop, "track", lambda *_: None)
    monkeypatch.setattr(loop, "documents", lambda corpus: "the documents")
    clock = Clock()
    monkeypatch.setattr(loop.time, "monotonic", clock.monotonic)
    return clock


def study(
    path: Path,
    clock: Clock,
    ran: list[tuple[str, int]],
    seeds: int = 2,
    settings: dict[str, Any] | None = None,
    seconds: float = 60,
    trouble: Callable[[Job], None] = lambda job: None,
) -> Study:
    """A study whose runs take `seconds` and yield made figures; `ran` hears of each."""
    made = Study(NEAR, METHODS, seeds, Records(path), settings or {})

    def run(job: Job) -> dict[str, Any]:
        trouble(job)
        ran.append((job.method.name, job.seed))
        clock.now += seconds
        figures = {"P@1": 50.0, "P@5": 30.0, "PSP@5": 20.0}
        return {"method": job.method.name, "kind": job.method.kind, "seed": job.seed, "wall_seconds": seconds, **figures}

    made.runners = dict.fromkeys(made.runners, run)
    return made


def test_seeds_go_round_robin_within_a_tier_and_ablations_come_last(tmp_path: Path, clock: Clock) -> None:
    ran: list[tuple[str, int]] = []
    outcome = study(tmp_path / "r.json", clock, ran).run(None)
    main = [("tfidf_knn", 1), ("one", 1), ("two", 1), ("small", 1), ("one", 2), ("two", 2), ("small", 2)]  # knn has no seed
    assert ran == [*main, ("extra", 1), ("extra", 2)]
    assert (outcome.finished, outcome.known, outcome.failed, outcome.left) == (9, 0, [], [])


def test_the_budget_holds_no_run_that_would_pass_it(tmp_path: Path, clock: Clock) -> None:
    ran: list[tuple[str, int]] = []
    first = study(tmp_path / "r.json", clock, ran)
    outcome = first.run(200)  # the fourth of 60 s would end at 240
    assert len(ran) == 3
    assert outcome.left[0] == "small, seed 1"
    clock.now = 0
    study(tmp_path / "r.json", clock, ran).run(100)
    assert ran[3:] == [("small", 1)]


def test_what_is_finished_is_not_done_again_until_something_changes(tmp_path: Path, clock: Clock) -> None:
    ran: list[tuple[str, int]] = []
    path = tmp_path / "r.json"

    def killed(job: Job) -> None:
        if (job.method.name, job.seed) == ("small", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(path, clock, ran, trouble=killed).run(None)
    before = list(ran)
    study(path, clock, ran).run(None)
    assert len(ran) == 9
    assert len(set(ran)) == 9  # each once
    assert ran[: len(before)] == before
    again = study(path, clock, ran)
    assert again.run(None).known == 9
    assert len(ran) == 9
    study(path, clock, ran, settings={"train.max_steps": 7}).run(None)  # another study: all but the rival anew
    assert len(ran) == 9 + 8


def test_a_key_follows_settings_seed_and_code(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    one = study(tmp_path / "r.json", clock, [])
    keys = {one.key(method, seed) for method in METHODS for seed in (1, 2)}
    assert len(keys) == 10
    monkeypatch.setattr(loop, "stage_code", lambda *stages: "other code")
    other = study(tmp_path / "r.json", clock, [])
    assert other.key(METHODS[1], 1) != one.key(METHODS[1], 1)
    assert other.key(METHODS[0], 1) == one.key(METHODS[0], 1)  # a rival does not depend on our training code


def test_a_failure_is_told_and_the_others_run(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def trouble(job: Job) -> None:
        if job.method.name == "two":
            raise InputError("no memory")
        if job.method.kind == "rival":
            raise Unavailable("tfidf_knn: no environment")

    ran: list[tuple[str, int]] = []
    path = tmp_path / "r.json"
    outcome = study(path, clock, ran, trouble=trouble).run(None)
    assert outcome.failed == ["tfidf_knn: no environment", "two, seed 1: no memory", "two, seed 2: no memory"]
    assert outcome.finished == 6
    assert "error: no memory" in capsys.readouterr().err
    absent = Records(path).find("tfidf_knn", 1)
    assert absent is not None
    assert absent["unavailable"] == "tfidf_knn: no environment"
    assert study(path, clock, ran).run(None).finished == 3  # tried again, and this time it is there
    found = Records(path).find("tfidf_knn", 1)
    assert found is not None
    assert "unavailable" not in found


def test_a_compressed_head_waits_for_its_parent(tmp_path: Path, clock: Clock) -> None:
    made = study(tmp_path / "r.json", clock, [])
    with pytest.raises(InputError, match="one with seed 1 has to run first"):
        made._compress(Job(METHODS[3], 1, ""))


def test_words_of_the_command_line() -> None:
    assert [budget(text) for text in ("90s", "30m", "1.5h")] == [90, 1800, 5400]
    with pytest.raises(Exception, match="is not a time"):
        budget("soon")
    assert setting("train.max_steps=40") == ("train.max_steps", 40)
    assert setting("head.kind=dense") == ("head.kind", "dense")
    with pytest.raises(Exception, match="is not a setting"):
        setting("train.max_steps")


SLOWLY = """
import subprocess, time
class Popen(subprocess.Popen):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        time.sleep(2)
subprocess.Popen = Popen
"""


@pytest.mark.parametrize("before", ["", SLOWLY], ids=["running", "starting"])
def test_what_the_study_started_is_stopped_with_it(tmp_path: Path, before: str) -> None:
    """SIGTERM to the study ends the command's whole process group, children of children too."""
    script = before + (
        "import sys; from study.__main__ import _interrupt; import signal; signal.signal(signal.SIGTERM, _interrupt)\n"
        "from study.processes import run_group\n"
        "run_group(['sh', '-c', 'sleep 600 & echo $! > grandchild; wait'], sys.stderr)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (tmp_path / "grandchild").exists() or not (tmp_path / "grandchild").read_text().strip():
        assert time.monotonic() < until
        time.sleep(0.02)
    pid = int((tmp_path / "grandchild").read_text())
    assert psutil.pid_exists(pid)
    process.terminate()
    assert process.wait(60) != 0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)
