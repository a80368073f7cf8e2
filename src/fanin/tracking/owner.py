"""Which project and which process a run belongs to."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


def project_root() -> Path:
    """The folder of mlflow.db and outbox/: $FANIN_ROOT, else the repository that a `dvc exp` copy was made from, else here."""
    if os.environ.get("FANIN_ROOT"):
        return Path(os.environ["FANIN_ROOT"]).resolve()
    here = Path.cwd()
    parts = here.parts
    for i in range(len(parts) - 2):
        if parts[i : i + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:i])
    return Path(os.environ.get("DVC_ROOT") or here)


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same number by its start."""

    host: str
    pid: int
    started: float  # seconds since the epoch

    @classmethod
    def of(cls, process: psutil.Process) -> Owner:
        return cls(socket.gethostname(), process.pid, round(process.create_time(), 2))

    @classmethod
    def this(cls) -> Owner:
        return cls.of(psutil.Process())

    @property
    def local(self) -> bool:
        return self.host == socket.gethostname()

    def alive(self) -> bool:
        """Whether this very process still runs here; False for one of another host."""
        try:
            process = psutil.Process(self.pid)
            # Linux derives the start from the boot time, which a clock adjustment moves: a second's tolerance
            return self.local and abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def key(self, root: Path) -> str:
        """Readable name of the pipeline run that this process owns, the same for all its stages."""
        moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.started))
        digest = hashlib.sha256(f"{self.host} {self.pid} {self.started} {root}".encode()).hexdigest()
        return f"{moment}-{digest[:8]}"


def find_owner() -> Owner:
    """The nearest `dvc` process above this one, else this process itself."""
    me = psutil.Process()
    try:
        for process in me.parents():
            if any(Path(word).name == "dvc" for word in process.cmdline()[:3]):
                return Owner.of(process)
    except psutil.Error:  # a process that ended, or one that may not be looked at
        pass
    return Owner.of(me)
