"""Each feature's places in a layer's index, found once per rewiring: what the deterministic sum of dx walks through."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fanin.kernels.triton.plan import RUN, SORTED_AT_ONCE

_KEPT = 8  # orders


@dataclass(frozen=True)
class Order:
    """Places of index [rows, K], flattened, in blocks of `rows` rows, sorted by the feature they hold.

    places [blocks, rows * K] uint16 (int32 where a block has more places); starts [blocks, D + 1] int32: feature d's places
    of block b are places[b, starts[b, d] : starts[b, d + 1]], ascending. The last block may be short. longest
    [blocks, ceil(D / RUN)] int32: the most places that one of each RUN features has.
    """

    rows: int
    places: Tensor
    starts: Tensor
    longest: Tensor

    def nbytes(self) -> int:
        return self.places.nbytes + self.starts.nbytes + self.longest.nbytes


def sort_by_feature(index: Tensor, features: int, rows: int) -> Order:
    """index [R, K] -> its Order, in blocks of `rows` rows (plan.block_rows); entries of `features` or above are in no list.

    Takes 2 bytes for each entry of the index (4 with more than 4,096 features; G > 1: 16,384) and 4 for each feature and
    block, which is less than a tenth of that for the usual shapes; while sorting about 96 MiB more.
    """
    total, fan_in = index.shape
    rows = min(rows, total)
    entries = rows * fan_in
    blocks = -(-total // rows)
    dtype = torch.uint16 if entries <= 2**16 else torch.int32
    places = torch.empty(blocks, entries, dtype=dtype, device=index.device)
    starts = torch.empty(blocks, features + 1, dtype=torch.int32, device=index.device)
    wanted = torch.arange(features + 1, dtype=torch.int32, device=index.device)
    flat, whole = index.reshape(-1), total // rows
    at_once = max(SORTED_AT_ONCE // entries, 1)
    runs = [(b, min(b + at_once, whole), entries) for b in range(0, whole, at_once)]
    if blocks > whole:
        runs.append((whole, blocks, flat.numel() - whole * entries))
    for begin, end, width in runs:
        own = flat[begin * entries : begin * entries + (end - begin) * width].view(end - begin, width)
        ordered, where = own.to(torch.int32).sort(dim=1, stable=True)
        places[begin:end, :width] = where.to(torch.int32).to(places.dtype)
        starts[begin:end] = torch.searchsorted(ordered, wanted.expand(end - begin, -1).contiguous(), out_int32=True)
    lengths = F.pad(starts.diff(dim=1), (0, -features % RUN))
    return Order(rows, places, starts, lengths.view(blocks, -1, RUN).amax(2))


class Orders:
    """The orders of the last few indices asked for, each until its index changes or is freed.

    A change in place is seen by the tensor's version counter, which its views share. Two kinds have none that could tell: an
    inference tensor is sorted anew each time, and a change through `.data` needs `clear`.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, tuple[StorageWeakRef, int, Order]] = OrderedDict()
        self._lock = threading.Lock()  # threads share a backend

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def get(self, index: Tensor, features: int, rows: int) -> Order:
        if index.is_inference():
            return sort_by_feature(index, features, rows)
        # the weak reference keeps the storage's address from being given to another one
        storage = StorageWeakRef(index.untyped_storage())
        key = (storage.cdata, index.storage_offset(), index.shape, index.dtype, features, rows)
        with self._lock:
            found = self._kept.get(key)
            if found is None or found[1] != index._version:
                for old in [k for k, (reference, _, _) in self._kept.items() if reference.expired()]:
                    del self._kept[old]
                found = self._kept[key] = (storage, index._version, sort_by_feature(index, features, rows))
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return found[2]
