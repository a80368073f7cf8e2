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
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fanin.files import write_json
from fanin.tracking.owner import Owner, project_root

LINK_BYTES = 2**20  # a file of this size or more is hard-linked into the outbox, a smaller one copied
TAIL_BYTES = 65536
SENT = "sent"
FOREIGN_SILENCE = 3600.0  # seconds after which a run of another host that writes nothing counts as dead

Event = dict[str, Any]


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
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
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

    def start(self) -> Event:
        """The first event: who runs it, where and since when; empty for a journal without a whole line."""
        return next((entry for _, entry in self.events()), {})

    def end(self) -> Event | None:
        """The event that closed the run, None while it is open. Reads the last 64 KiB alone, however long the journal."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            if line.startswith(b'{"event": "end"'):
                return json.loads(line)
        return None

    def ended(self, status: str) -> bool:
        """Whether the run has ended with this status."""
        end = self.end()
        return end is not None and end["status"] == status

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
        start = self.start()
        if not start or self.end() is not None:
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

    def artifact(self, source: Path, folder: str) -> None:
        """Keep a file or folder (see `keep`) and note it as an artifact to be sent."""
        self.append("artifact", path=self.keep(source, source.name), folder=folder, directory=source.is_dir())

    def state(self) -> dict[str, Any]:
        """What the server has of it, as the sender noted: uri, experiment, run_id, offset; empty if nothing."""
        try:
            return json.loads((self.folder / "state.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the sender's note."""
        write_json(self.folder / "state.json", dict(state))

    def unsent(self) -> bool:
        """Whether there is something that the server was not told."""
        return self.end_of_whole_lines() > self.state().get("offset", 0)

    def end_of_whole_lines(self) -> int:
        """Length of the journal without a line that is still being written, in bytes."""
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                while size > 0:
                    start = max(0, size - TAIL_BYTES)
                    file.seek(start)
                    newline = file.read(size - start).rfind(b"\n")
                    if newline >= 0:
                        return start + newline + 1
                    size = start
        except FileNotFoundError:
            pass
        return 0


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
        return sorted(found, key=lambda journal: journal.start().get("time", 0))

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

    def unarchive(self) -> None:
        """Put the sent pipeline runs back as if no server had heard of them."""
        for path in sorted((self.folder / SENT).glob("*/journal.jsonl")):
            for state in path.parent.rglob("state.json"):
                state.unlink()
            path.parent.rename(self.folder / path.parent.name)

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
