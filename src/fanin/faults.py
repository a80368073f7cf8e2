"""What a long run meets beside its own numbers: signals, a second run in its folder, memory that runs out."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch import Tensor

from fanin.checkpoint import last_good
from fanin.files import InputError
from fanin.memory import advice
from fanin.memory.job import MIB, Job
from fanin.memory.plan import Plan

_LESS = 0.9  # of the plan, which did not fit: what a change must bring to be worth naming
_CHUNK = 2**22  # entries looked at together
_LOCK = ".lock"


class Signals:
    """Take SIGINT and SIGTERM for a while; the handlers before come back after it. Only in the main thread."""

    def __init__(self, handler: Callable[[int, FrameType | None], None]) -> None:
        self.handler = handler
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold `folder` for one training run. Raises InputError naming the process that holds it already.

    The lock is the kernel's (flock): it ends with its process, however that ends, so a dead run never blocks a new one. The
    file stays, because to remove it would let two runs hold a lock each.
    """
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; make the folder writable or choose another one") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another training run ({_holder(path)}) is using this folder; wait for it or stop it, or train "
                "in a copy of the project"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"warning: {folder} cannot be locked ({error.strerror}); start no second run here", file=sys.stderr)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node()}))
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):  # it is just about to write that
        return "one that has just started"


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinite values; a chunk at a time."""
    for tensor in tensors:
        if not tensor.is_floating_point():
            continue
        for piece in tensor.detach().reshape(-1).split(_CHUNK):
            if piece.numel() and not torch.stack(torch.aminmax(piece.float())).isfinite().all():  # both pass NaN on
                return False
    return True


@contextmanager
def memory_explained(job: Job, plan: Plan, checkpoints: Path) -> Iterator[None]:
    """Turn running out of memory into an InputError: what was held, what `plan` says is large, what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        told = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # what torch's allocator on a CPU raises has no class of its own
        if not told and "t allocate memory" not in text and "not enough memory" not in text:
            raise
        if job.device.type == "cuda":
            total = torch.cuda.get_device_properties(job.device).total_memory / MIB
            held = f"at most {torch.cuda.max_memory_allocated(job.device) / MIB:,.0f} of {total:,.0f} MiB were allocated"
        else:
            held = f"{psutil.Process().memory_info().rss / MIB:,.0f} MiB were resident"
        sizes = sorted(((size, part) for part, size in plan.lines().items() if size >= MIB), reverse=True)
        largest = ", ".join(f"{part} {size / MIB:,.0f}" for size, part in sizes[:4])
        enough = plan.baseline + int(_LESS * (plan.need - plan.baseline))
        found = advice.cheapest(job, enough, plan.baseline)
        options = "; or ".join(f"{change} ({other.need / MIB:,.0f} MiB)" for change, other in found)
        raise InputError(
            f"training ran out of memory on {job.device}: {held}; planned were {plan.need / MIB:,.0f} MiB, in the {plan.phase} "
            f"phase ({largest}); less is taken with {options or 'fewer labels only'}; {last_good(checkpoints)} ({text[:300]})"
        ) from error
