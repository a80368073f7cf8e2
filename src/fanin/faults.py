"""What a long run meets beside its own numbers: signals, a second run in its folder, numbers that are none."""

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

import torch
from torch import Tensor

from fanin.files import InputError

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
