"""The process that sends journals to MLflow while stages run, and the commands around it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

import psutil

from fanin.config import load_config
from fanin.files import InputError, read_json, write_json
from fanin.tracking.mirror import Mirror, Summary
from fanin.tracking.outbox import SENT, Journal, Outbox
from fanin.tracking.owner import Owner
from fanin.tracking.pipelines import PARENT_VARIABLE, close_pipeline, describe_pipeline, open_pipeline, redirect_pipeline
from fanin.tracking.store import store_uri

MODE_VARIABLE = "FANIN_TRACKING"  # offline: journals only, nothing is sent until `sync`; off: nothing is written

LIVE_SECONDS = 15.0  # how old a live curve may be
LAST_TRIES = 3  # of a server that does not answer, once no run is open
WAIT_SECONDS = 10.0  # that the wrapper gives the sender after the command's end
IMPATIENT_SECONDS = 2.0  # the same after a Ctrl-C
LOG_BYTES = 2**20


def ensure_sender(outbox: Outbox) -> None:
    """Start the sender in the background unless one is at work (or $FANIN_TRACKING says offline)."""
    if os.environ.get(MODE_VARIABLE) in ("offline", "off"):
        return
    with outbox.lock("sender", wait=False) as free:
        if not free:
            return
    log = outbox.folder / "sender.log"
    fresh = not log.exists() or log.stat().st_size > LOG_BYTES
    with open(log, "w" if fresh else "a") as file:
        subprocess.Popen(
            [sys.executable, "-m", "fanin.tracking", "send"],
            cwd=outbox.root,
            env=os.environ | {"FANIN_ROOT": str(outbox.root)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a Ctrl-C in the terminal is not meant for it
        )


def open_pipelines(outbox: Outbox) -> list[Journal]:
    """Pipeline runs of this host that go on; those whose process is gone are closed on the way."""
    going_on = []
    for pipeline in outbox.pipelines():
        if pipeline.end() is not None:
            continue
        stages = outbox.stages(pipeline)
        over = pipeline.dead() and all(journal.end() is not None or journal.dead() for journal in stages)
        if not over:
            start = pipeline.start()
            if start and Owner(**start["owner"]).local:
                going_on.append(pipeline)
        elif pipeline.last("describe") is None:
            shutil.rmtree(pipeline.folder, ignore_errors=True)  # it ended before it had settings: nothing ran
        else:
            close_pipeline(outbox, pipeline)
    return going_on


def send_loop() -> int:
    """Send until no run is open and nothing waits, or the server has not answered for a while. One at a time."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    outbox = Outbox()
    os.nice(10)
    mirror = Mirror(outbox)
    while True:
        with outbox.lock("sender", wait=False) as mine:
            if not mine:
                return 0
            waiting = _send_until_idle(outbox, mirror)
        # a run that began while this process decided to end found the lock taken: look once more without it
        if waiting or not open_pipelines(outbox):
            return 0


def _send_until_idle(outbox: Outbox, mirror: Mirror) -> bool:
    """Returns whether something waits for a server that does not answer."""
    sent_at, failures, ended_before = -LIVE_SECONDS, 0, -1
    pause = LIVE_SECONDS
    while True:
        going_on = open_pipelines(outbox)
        journals = [journal for pipeline in outbox.pipelines() for journal in (pipeline, *outbox.stages(pipeline))]
        ended = sum(journal.end() is not None for journal in journals if journal.unsent())
        due = time.monotonic() - sent_at >= pause or (ended > ended_before and ended > 0)
        last_try = not going_on
        if any(journal.unsent() for journal in journals) and (due or last_try):
            summary = mirror.flush()
            sent_at, ended_before = time.monotonic(), ended
            _note(outbox, summary)
            failures = failures + 1 if summary.problems else 0
            pause = min(LIVE_SECONDS * (1 + failures), 60)
            if not summary.problems:
                ended_before = 0
            if last_try and failures >= LAST_TRIES:
                return True
        elif last_try:
            return False
        time.sleep(1.0 if not (last_try and failures) else 5.0)


def _note(outbox: Outbox, summary: Summary) -> None:
    write_json(outbox.folder / ".status.json", {"time": time.time(), "problems": summary.problems})
    for problem in summary.problems:
        logging.warning("not sent: %s", problem)


def sync(*, again: bool = False, to: str | None = None) -> int:
    """Close what is dead, send what waits, say what became of it. Exit code 1 where something still waits.

    again: also what was sent before. to: the address of a store that gets it, whatever the runs named.
    """
    outbox = Outbox()
    if again:
        outbox.unarchive()
    if to is not None:
        for pipeline in outbox.pipelines():
            redirect_pipeline(outbox, pipeline, to)
    open_pipelines(outbox)
    summary = Mirror(outbox).flush()
    left = [pipeline.key for pipeline in outbox.pipelines() if pipeline.end() is not None]
    print(f"tracking: {len(summary.runs)} pipeline run(s) sent in full, {summary.events} new events")
    for problem in summary.problems:
        print(f"tracking: not sent to {problem}", file=sys.stderr)
    if left:
        advice = "repeat `make sync` when the server is back"
        print(f"tracking: {len(left)} run(s) wait in {outbox.folder}; {advice}", file=sys.stderr)
    return 1 if summary.problems else 0


def wrap(words: Sequence[str]) -> int:
    """Run a command as one pipeline run; returns its exit code (128 + signal where a signal ended it)."""
    outbox = Outbox()
    mode = os.environ.get(MODE_VARIABLE)
    try:
        pipeline = None if mode == "off" else open_pipeline(outbox, Owner.this(), words)
    except OSError as error:
        print(f"warning: no tracking, the run goes on: {error}", file=sys.stderr)
        pipeline = None
    environment = os.environ | {"FANIN_ROOT": str(outbox.root)} | ({PARENT_VARIABLE: pipeline.key} if pipeline else {})
    lock = outbox.root / "dvc.lock"
    before = lock.read_bytes() if lock.exists() else b""
    # Ctrl-C reaches the command from the terminal; SIGTERM is passed to the stage, whose end lets dvc end
    signals: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if number == signal.SIGTERM and process is not None:
            _terminate(outbox, pipeline, process)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        process = subprocess.Popen(words, env=environment)
    except OSError as error:
        print(f"error: cannot run {words[0]}: {error.strerror}", file=sys.stderr)
        if pipeline:
            shutil.rmtree(pipeline.folder, ignore_errors=True)
        return 127
    if signal.SIGTERM in signals:  # it came before there was anything to pass it to
        process.terminate()
    code = process.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if pipeline is not None:
        changed = before != (lock.read_bytes() if lock.exists() else b"")
        _finish(outbox, pipeline, code, changed=changed, patience=IMPATIENT_SECONDS if signals else WAIT_SECONDS)
    return code if code >= 0 else 128 - code


def _terminate(outbox: Outbox, pipeline: Journal | None, process: subprocess.Popen[bytes]) -> None:
    stages = outbox.stages(pipeline) if pipeline else []
    starts = [journal.start() for journal in stages if journal.end() is None]
    owners = [Owner(**start["owner"]) for start in starts if start]
    alive = [owner for owner in owners if owner.alive()]
    for owner in alive:
        psutil.Process(owner.pid).terminate()
    if not alive:
        process.terminate()


def experiment_name(words: Sequence[str]) -> str | None:
    """The name that a `dvc exp run` command gives its experiment."""
    for number, word in enumerate(words):
        if word in ("-n", "--name") and number + 1 < len(words):
            return words[number + 1]
        if word.startswith("--name="):
            return word.partition("=")[2]
    return None


def _finish(outbox: Outbox, pipeline: Journal, code: int, *, changed: bool, patience: float) -> None:
    if not changed and not outbox.stages(pipeline):  # nothing ran
        shutil.rmtree(pipeline.folder, ignore_errors=True)
        return
    try:
        name = experiment_name(pipeline.start()["command"])
        if name:  # dvc tells it to stages alone, and there may have been none
            os.environ.setdefault("DVC_EXP_NAME", name)
        describe_pipeline(pipeline, load_config())
        close_pipeline(outbox, pipeline, code)
    except InputError:
        shutil.rmtree(pipeline.folder, ignore_errors=True)
        return
    except OSError as error:
        print(f"warning: tracking lost something: {error}", file=sys.stderr)
        return
    name = (pipeline.last("describe") or {}).get("name", pipeline.key)
    if os.environ.get(MODE_VARIABLE) == "offline":
        print(f"tracking: run '{name}' is in {pipeline.folder}; `make sync` sends it")
        return
    try:
        outcome = _wait(outbox, pipeline, name, patience)
    except KeyboardInterrupt:
        outcome = f"run '{name}' is being sent in the background"
    print(f"tracking: {outcome}")


def _wait(outbox: Outbox, pipeline: Journal, name: str, patience: float) -> str:
    began = time.time()
    ensure_sender(outbox)
    status = outbox.folder / ".status.json"
    uri = pipeline.state().get("uri") or store_uri(outbox, (pipeline.last("describe") or {}).get("uri"))
    while time.time() - began < patience:
        if not pipeline.folder.exists():
            state = Journal(outbox.folder / SENT / pipeline.folder.name).state()
            place = "`make ui` shows it"
            if uri.startswith("http"):
                place = f"{uri.rstrip('/')}/#/experiments/{state['experiment']}/runs/{state['run_id']}"
            return f"run '{name}' is in MLflow: {place}"
        if status.exists() and status.stat().st_mtime > began:
            problems = [problem for problem in read_json(status)["problems"] if problem.startswith(f"{uri}: ")]
            if problems:
                return f"run '{name}' waits in {pipeline.folder}, not sent to {problems[0]}; `make sync` sends it"
        time.sleep(0.2)
    return f"run '{name}' is still being sent in the background from {pipeline.folder}"
