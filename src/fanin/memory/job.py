"""A training step to be planned: settings, sizes and a device; and what memory that device has left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from fanin.config import Config
from fanin.files import InputError
from fanin.lexical import lexical_sizes
from fanin.memory.peaks import current
from fanin.memory.plan import Plan, predict
from fanin.memory.shapes import EncoderShape

MIB = 2**20
CPU = torch.device("cpu")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """One head at one size, to be planned and perhaps measured; `config` is the run's, with the head in question.

    tokens: T of the longest batch; documents: trained on; ranks: processes that share the labels.
    """

    config: Config
    shape: EncoderShape
    labels: int
    tokens: int
    device: torch.device
    precision: torch.dtype
    documents: int = 0
    ranks: int = 1

    @property
    def inner(self) -> int:
        """D', the features of the encoder that the head can read."""
        return self.config.head.intermediate or self.shape.width(self.config)

    @property
    def features(self) -> int:
        """D' + C + V', with profiles and words behind them."""
        return self.inner + sum(lexical_sizes(self.config.head, self.shape.vocabulary, self.inner, self.labels))

    def plan(self, baseline: int | None = None) -> Plan:
        """The prediction; `baseline` bytes of the process itself, on a CPU this one's where it is not given."""
        if baseline is None:
            baseline = current(CPU) if self.device.type == "cpu" else 0
        return predict(
            self.config,
            self.shape,
            self.labels,
            batch=self.config.train.batch,
            tokens=self.tokens,
            device=self.device.type,
            precision=self.precision,
            baseline=baseline,
            documents=self.documents,
            ranks=self.ranks,
        )

    def too_large(self, what: str, room: int) -> InputError:
        """The error for a step that does not fit into `room` bytes; `what` happened."""
        plan, train = self.plan(), self.config.train
        return InputError(
            f"memory: {what}: a training step of the {self.config.head.kind} head with {self.labels:,} labels, "
            f"train.batch {train.batch} and {self.tokens} tokens takes about {plan.peak / MIB:,.0f} MiB ({plan.phase}: "
            f"activations {plan.parts()['activations'] / MIB:,.0f}), and {room / MIB:,.0f} MiB are free; lower train.batch "
            "(with train.accumulation for the same updates), tokens.max_length, or the head's width"
        )


def available(device: torch.device) -> int:
    """Bytes that a new process can have: free on the GPU, else what the system and its control groups leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(min([psutil.virtual_memory().available, *_group_rooms()]), 0)


def _group_rooms() -> Iterator[int]:
    """What each control group with a limit leaves: this process's own and those above it (version 2), or version 1's."""
    own = ""
    with suppress(OSError, StopIteration):
        own = next(line[3:].strip("/ \n") for line in _OWN_GROUP.read_text().splitlines(True) if line.startswith("0::"))
    folder = _CGROUP / own
    files = [
        (place / "memory.max", place / "memory.current")
        for place in (folder, *folder.parents)
        if _CGROUP in (place, *place.parents)
    ]
    files.append((_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"))
    for limit, used in files:
        with suppress(OSError, ValueError):  # no such group, or "max"
            yield int(limit.read_text()) - int(used.read_text())
