"""How much memory this process uses, and its peak from one phase of the training step to the next.

A CPU peak is resident memory. glibc keeps freed blocks below its threshold, which rises to 32 MiB, so that a process
stays some hundreds of MiB above what its tensors ever needed, by an amount that depends on the order of allocations. The
peak is therefore measured with the threshold held at 128 KiB, where every larger tensor leaves when it is freed; then once
more with glibc's own way, and the difference is reported as `allocator`. Training runs that way.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from fanin.trainer import Trainer

_THRESHOLD = 128 * 1024  # glibc begins with it
_ENDS_AT = 32 * 2**20  # and can end at it
_LEFT_TO_GROW = 1.5  # what a process may grow to, of what is left after a trim
_MALLOPT = {"trim_threshold": -1, "mmap_threshold": -3}  # malloc.h


class Peaks:
    """The highest memory use in each phase; `enter` ends one phase and begins the next.

    On a CPU resident memory, on CUDA allocated memory, with `reserved` beside it. Where the system does not let the peak
    be reset (other than Linux, or no permission), there is one phase, "all".
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.resettable = device.type == "cuda" or _reset_resident_peak()
        self.highest: dict[str, int] = {}
        self.reserved = 0
        self._phase = "all"

    def enter(self, phase: str) -> None:
        peak = self._peak()
        self.highest[self._phase] = max(self.highest.get(self._phase, 0), peak)
        if self.resettable:
            self._phase = phase
            self._reset()

    def begin(self, phase: str) -> None:
        """Forget what was, and begin with this phase."""
        self.highest.clear()
        if self.resettable:
            self._phase = phase
            self._reset()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
            return torch.cuda.max_memory_allocated(self.device)
        return resident_peak()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_resident_peak()

    def watch(self, trainer: Trainer) -> None:
        """Divide the trainer's steps into phases: forward, head, backward, update, rewire."""
        self._around(trainer.classifier, "embed", "forward", None)
        self._around(trainer.classifier.head, "step", "head", "backward")
        self._around(trainer.optimizer, "step", "update", "after")
        self._around(trainer.classifier.head, "rewire", "rewire", "after")

    def _around(self, owner: Any, name: str, phase: str, following: str | None) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            self.enter(phase)
            result = original(*arguments, **settings)
            if following is not None:
                self.enter(following)
            return result

        setattr(owner, name, call)


def current(device: torch.device) -> int:
    """Memory in use now: resident, or allocated on CUDA."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def resident_peak() -> int:
    """This process's highest resident memory, since the last reset where there was one."""
    found = _status("VmHWM")
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def pin_allocator() -> bool:
    """Have freed blocks of 128 KiB and more go back to the system; False where the C library is not glibc."""
    return _mallopt("mmap_threshold", _THRESHOLD)


def release_allocator() -> None:
    """Let glibc keep freed blocks as it does by itself, once it has seen tensors of 32 MiB come and go."""
    _mallopt("mmap_threshold", _ENDS_AT)
    _mallopt("trim_threshold", 2 * _ENDS_AT)


class Trimmer:
    """To be called between steps: where the process has taken more than `more` bytes since this was made, what glibc keeps of
    freed blocks goes back to the system.

    Batches of many lengths leave blocks of many sizes, and what is kept of them grows over hundreds of steps, to twice what a
    step needs where texts are long. Files that are mapped do not count. Does nothing where the system is not Linux.
    """

    def __init__(self, more: int) -> None:
        self.limit, self.trimmed = _anonymous() + more, 0

    def __call__(self) -> None:
        if _anonymous() > self.limit:
            trim_allocator()
            self.trimmed += 1
            self.limit = max(self.limit, int(_LEFT_TO_GROW * _anonymous()))  # where more is in use: not after every step


def _anonymous() -> int:
    """Bytes resident that no file stands for; 0 where the system does not say."""
    return _status("RssAnon")


def _status(field: str) -> int:
    """Bytes that /proc/self/status names; 0 where it does not."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def trim_allocator() -> None:
    """Give what is free back to the system."""
    if sys.platform == "linux":
        _libc("malloc_trim", 0)


def _mallopt(setting: str, value: int) -> bool:
    """Set one of glibc's malloc parameters; False where the C library has none."""
    return _libc("mallopt", _MALLOPT[setting], value) == 1


def _libc(function: str, *arguments: int) -> int:
    try:
        return getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError, TypeError):
        return 0
