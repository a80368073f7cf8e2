"""What runs leave on disk for tracking: journals, artifacts, and who owns them. Plain files, no MLflow here.

    outbox/<pipeline run>/journal.jsonl          one JSON line an event, appended by the run itself
    outbox/<pipeline run>/state.json             what the tracking server has: its run id, how far it was told
    outbox/<pipeline run>/files/                 artifacts, copied (large ones hard-linked) when they were logged
    outbox/<pipeline run>/<stage>/...            the same three for each stage of it
    outbox/sent/<pipeline run>/                  whole pipeline runs that the server has, without their large files

A pipeline run is owned by a process (`dvc`, or the wrapper that started it, or the stage itself where it was started by
hand). Its key follows from that process, so all stages of one `dvc repro` find the same folder without being told.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fanin.files import write_json

LINK_BYTES = 2**20  # a file of this size or more is hard-linked into the outbox, a smaller one copied
SENT = "sent"
FOREIGN_SILENCE = 3600.0  # seconds after which a run of another host that writes nothing counts as dead

Event = dict[str, Any]


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


class Journal:
    """One run's folder: events appended by whole lines, so that a killed writer leaves a readable file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"

    @property
    def key(self) -> str:
        """Name of the run among all runs ever: <pipeline run> or <pipeline run>/<stage>."""
        inside = self.folder.parent.name not in ("outbox", SENT)
        return f"{self.folder.parent.name}/{self.folder.name}" if inside else self.folder.name

    def append(self, event: str, **fields: Any) -> None:
        """Add one event with the time in milliseconds. Raises OSError where the folder cannot be written."""
        line = json.dumps({"event": event, "time": int(time.time() * 1000), **fields}, default=str, ensure_ascii=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (("\n" if torn else "") + line + "\n").encode())
        finally:
            os.close(descriptor)

    def events(self, offset: int = 0) -> Iterator[tuple[int, Event]]:
        """Whole events from a byte offset on, each with the offset after it; a torn line is passed over."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    yield offset, json.loads(line)
                except ValueError:
                    continue

    def last(self, event: str) -> Event | None:
        """The latest event of a kind."""
        found = None
        for _, entry in self.events():
            if entry["event"] == event:
                found = entry
        return found

    def tags(self) -> dict[str, str]:
        """All tags, the latest value of each."""
        found: dict[str, str] = {}
        for _, entry in self.events():
            if entry["event"] == "tags":
                found |= entry["values"]
        return found

    def silent_for(self) -> float:
        """Seconds since the last event."""
        return time.time() - self.path.stat().st_mtime

    def dead(self) -> bool:
        """Whether the run has no end and its process is gone (of another host: silent for an hour)."""
        start = self.last("start")
        if start is None or self.last("end") is not None:
            return False
        owner = Owner(**start["owner"])
        return not owner.alive() if owner.local else self.silent_for() > FOREIGN_SILENCE

    def keep(self, source: Path, name: str) -> str:
        """Copy a file or folder as it is now into the run's folder; large files are hard-linked. Returns the path in it.

        A link is safe because everything in this project replaces files and never writes into them.
        """
        target = self.folder / "files" / name
        number = 1
        while target.exists():  # logged before under the same name: both stay as they were
            number += 1
            target = self.folder / "files" / f"{number}" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            _copy(str(source), str(target))
        return str(target.relative_to(self.folder))

    # what the server was told: written by the sender alone
    def state(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "state.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def save_state(self, state: Mapping[str, Any]) -> None:
        write_json(self.folder / "state.json", dict(state))

    def unsent(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > self.state().get("offset", 0)


def _copy(source: str, target: str) -> str:
    if os.path.getsize(source) >= LINK_BYTES:
        try:
            os.link(os.path.realpath(source), target)
            return target
        except OSError:  # another disk, or a file system without links
            pass
    shutil.copyfile(source, target)
    return target


class Outbox:
    """The folder of all journals of a project."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or project_root()
        self.folder = self.root / "outbox"

    def pipeline(self, key: str) -> Journal:
        return Journal(self.folder / key)

    def pipelines(self) -> list[Journal]:
        """Pipeline runs that are open or not wholly sent, the oldest first."""
        return [Journal(path.parent) for path in sorted(self.folder.glob("*/journal.jsonl")) if path.parent.name != SENT]

    @staticmethod
    def stages(pipeline: Journal) -> list[Journal]:
        """The pipeline run's stages in the order in which they began."""
        found = [Journal(path.parent) for path in pipeline.folder.glob("*/journal.jsonl")]
        return sorted(found, key=lambda journal: next((entry["time"] for _, entry in journal.events()), 0))

    def new_stage(self, pipeline: Journal, name: str) -> Journal:
        """A fresh folder for a stage; a second attempt in the same pipeline run gets a number."""
        number = 1
        while True:
            folder = pipeline.folder / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
                return Journal(folder)
            except FileExistsError:
                number += 1

    def archive(self, pipeline: Journal) -> None:
        """Move a wholly sent pipeline run to outbox/sent/, its journals and small artifacts kept."""
        for path in pipeline.folder.rglob("files/**/*"):
            if path.is_file() and path.stat().st_size >= LINK_BYTES:
                path.unlink()
        target = self.folder / SENT / pipeline.folder.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        pipeline.folder.rename(target)

    @contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold a named lock between processes; yields whether it was got (always, when waiting)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".{name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
