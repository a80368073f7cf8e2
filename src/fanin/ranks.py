"""The processes that train one model together, and the few things they tell each other.

Documents and labels are both shared out. Each rank encodes its documents of a batch and holds the head's rows of its labels;
features of all documents go to every rank, and the gradients that come back are summed and returned to the documents'
ranks. So a batch's result depends on the number of ranks in the last bits alone, and not at all where there is one.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fanin import torchrun
from fanin.files import InputError

BUCKET = 2**25  # bytes of gradients that travel together
# A rank may load a corpus or write a checkpoint for long while the others wait; one that died is noticed at once.
PATIENCE = datetime.timedelta(hours=1)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """Which of `size` processes this is; alone, every method is what one process needs: nothing.

    local: processes of this machine, which share its memory.
    """

    rank: int = 0
    size: int = 1
    local: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints, records and writes what there is one of."""
        return self.rank == 0

    def share(self, count: int, unit: int = 1, rank: int | None = None) -> tuple[int, int]:
        """First and one past the last of `count` things that are a rank's (this one's unless given), in whole units."""
        rank = self.rank if rank is None else rank
        units = -(-count // unit)
        return tuple(min(units * part // self.size * unit, count) for part in (rank, rank + 1))  # type: ignore[return-value]

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Every rank's `share` of `count` things."""
        return [self.share(count, rank=rank) for rank in range(self.size)]

    # tensors ------------------------------------------------------------------------------------------------------

    def gather(self, own: Tensor, count: int) -> Tensor:
        """Each rank's rows [share of count, ...] -> everyone's, in order [count, ...]."""
        if self.size == 1:
            return own
        everyone = self.collect(_padded(own, -(-count // self.size)))
        return torch.cat([everyone[rank][: last - first] for rank, (first, last) in enumerate(self.shares(count))])

    def collect(self, own: Tensor) -> Sequence[Tensor]:
        """Tensors of one shape, one from each rank."""
        if self.size == 1:
            return [own]
        everyone = own.new_empty(self.size * own.numel())
        with _older_names():
            dist.all_gather_into_tensor(everyone, own.reshape(-1))
        return everyone.view(self.size, *own.shape).unbind()

    def scatter_sum(self, parts: Tensor) -> Tensor:
        """Each rank's part of a sum over ranks [count, ...] -> the sum's rows that are this rank's share."""
        if self.size == 1:
            return parts
        shares = self.shares(len(parts))
        most = -(-len(parts) // self.size)
        if any(last - first != most for first, last in shares):
            parts = torch.cat([_padded(parts[first:last], most) for first, last in shares])
        own = parts.new_empty((most, *parts.shape[1:]))
        with _older_names():
            dist.reduce_scatter_tensor(own, parts.contiguous())
        first, last = shares[self.rank]
        return own[: last - first]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype, the same on every rank in number and shape, by their sums over ranks.

        They travel in buckets of 32 MiB, each in order, so that everyone gets the same bits.
        """
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor)
            if sum(t.numel() * t.element_size() for t in bucket) >= BUCKET:
                _sum_bucket(bucket)
                bucket = []
        _sum_bucket(bucket)

    # numbers and words --------------------------------------------------------------------------------------------

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each of the ranks' values; on the host, so that no device is waited for."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of the ranks' values."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        both = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(both, op=operation)
        return both.tolist()

    def of_first(self, value: _T) -> _T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    @contextmanager
    def agreed(self, kind: type[Exception] = OSError) -> Iterator[None]:
        """What one rank fails at, no rank does: an error in the block is raised everywhere, as `kind` on the others.

        Nothing in the block may wait for other ranks.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        everyone = self._words(str(own) if own is not None else None)
        if own is not None:
            raise own
        for rank, words in enumerate(everyone):
            if words is not None:
                raise kind(f"rank {rank}: {words}")

    def _words(self, own: str | None) -> list[str | None]:
        if self.size == 1:
            return [own]
        everyone: list[str | None] = [None] * self.size
        if self.most([own is not None])[0]:
            dist.all_gather_object(everyone, own)
        return everyone

    def wait(self) -> None:
        """Go on when every rank is here."""
        self.most([0])


ALONE = Ranks()


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """Meet the other processes that torchrun started (torch.distributed.run); alone without it.

    device: train.device; on GPUs each process takes the one of its local number. Raises InputError where that is missing.
    """
    if not torchrun.joined():
        yield ALONE
        return
    local = int(os.environ["LOCAL_RANK"])
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"train.processes: process {local + 1} has no GPU of its own, there are {torch.cuda.device_count()}; use as many "
            "processes, or train.device cpu"
        )
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        dist.destroy_process_group()


def _padded(rows: Tensor, count: int) -> Tensor:
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros((count - len(rows), *rows.shape[1:]))])


def _sum_bucket(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0])
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def _older_names() -> Iterator[None]:
    """torch 2.13 warns of names that 2.11 has no other for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
