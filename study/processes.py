"""Running commands so that stopping the study stops them too."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import IO

PATIENCE = 60  # seconds between SIGTERM and SIGKILL: a training writes its checkpoint first


def run_group(words: list[str], log: IO[str], environment: dict[str, str] | None = None) -> int:
    """Run a command in a process group of its own; where this process is stopped, the group gets SIGTERM first.

    Returns the exit code.
    """
    process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
