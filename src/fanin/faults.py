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
from fanin.config import Config
from fanin.files import InputError

_MIB = 2**20
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
def memory_explained(config: Config, labels: int, device: torch.device, checkpoints: Path) -> Iterator[None]:
    """Turn running out of memory into an InputError: what was held, what the plan says is large, what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        told = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # what torch's allocator on a CPU raises has no class of its own
        if not told and "t allocate memory" not in text and "not enough memory" not in text:
            raise
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory / _MIB
            held = f"at most {torch.cuda.max_memory_allocated(device) / _MIB:,.0f} of {total:,.0f} MiB were allocated"
        else:
            held = f"{psutil.Process().memory_info().rss / _MIB:,.0f} MiB were resident"
        planned, advice = _planned(config, labels, device)
        raise InputError(
            f"training ran out of memory on {device}: {held}; {planned}{advice}; {last_good(checkpoints)} ({text[:300]})"
        ) from error


_ADVICE = {
    "activations": "lower train.batch (and raise train.accumulation as much) or tokens.max_length",
    "buffers": "lower train.batch (and raise train.accumulation as much)",
    "head_weights": "lower head.fan_in or set head.dtype to bf16",
    "indices": "lower head.fan_in or raise head.group",
    "head_optimizer": "set train.momentum to 0 or head.dtype to bf16",
    "encoder": "choose a smaller encoder.name",
    "encoder_optimizer": "choose a smaller encoder.name",
}


def _planned(config: Config, labels: int, device: torch.device) -> tuple[str, str]:
    """The plan's largest parts in words, and what would make the two largest smaller."""
    from transformers import AutoConfig

    from fanin.encoder import choose_precision, resolve
    from fanin.memory.plan import EncoderShape, predict

    try:
        plan = predict(
            config,
            EncoderShape.of(AutoConfig.from_pretrained(resolve(config.encoder.name)), config.encoder.hidden_dropout),
            labels,
            batch=config.train.batch,
            tokens=config.tokens.max_length,
            device=device.type,
            precision=choose_precision(config.train.precision, device),
        )
    except (InputError, OSError):  # an encoder that cannot be planned
        return "", _ADVICE["activations"]
    parts = sorted(((size, name) for name, size in plan.parts().items() if size and name in _ADVICE), reverse=True)
    sizes = ", ".join(f"{name.replace('_', ' ')} {size / _MIB:,.0f}" for size, name in parts)
    changes = dict.fromkeys(_ADVICE[name] for _, name in parts[:2])
    return f"the plan for a step is {plan.peak / _MIB:,.0f} MiB in the {plan.phase} phase ({sizes}); ", ", and ".join(changes)
