"""torchrun seen from a stage: whether this process is one of its, and how a stage becomes several."""

from __future__ import annotations

import os
import sys


def joined() -> bool:
    """Whether torchrun started this process as one of several."""
    return started() and int(os.environ["WORLD_SIZE"]) > 1


def started() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leads() -> bool:
    """Whether this is the first process of all machines'."""
    return not joined() or os.environ["RANK"] == "0"


def launch(processes: int) -> None:
    """Where one process is not enough and torchrun is not there yet, become torchrun with so many of this very command."""
    if processes > 1 and not started():
        sys.stdout.flush()
        sys.stderr.flush()
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        os.execv(sys.executable, [*run, *sys.argv])
