"""Running commands so that stopping the study stops them too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import IO

PATIENCE = 60  # seconds between SIGTERM and SIGKILL: a training writes its checkpoint first


def run_group(words: list[str], log: IO[str], environment: dict[str, str] | None = None) -> int:
    """Run a command in a process group of its own; where this process is stopped, the group gets SIGTERM first.

    Returns the exit code.
    """
    process = None
    try:
        with _signals_wait():  # one that came while the command starts would leave it running, known to nobody
            process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        return process.wait()
    except BaseException:
        if process is not None:
            _stop(process)
        raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM that come meanwhile are handled at the end."""
    if threading.current_thread() is not threading.main_thread():  # no other is interrupted by them
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handled:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
