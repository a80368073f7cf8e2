"""Checks on a backend's arguments, made before any memory is written."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fanin.kernels.layer import FAN_IN_LIMIT, INDEX_TYPES, LOSSES, WEIGHT_TYPES, Layer

INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDER, _INTEGERS = (torch.float64,), (torch.int16, torch.int64)


def check_layer(x: Tensor, layer: Layer, *, plain: bool = False) -> None:
    """x [B, D] and the layer's tensors fit together, lie in memory without gaps (x may be strided), and no index is beyond D.

    plain: for plain torch, which takes any float type, any fan-in and indices of any integer type too.

    The index is read when it is new or has changed, and not again (`_in_range`). That a row's indices are distinct is
    `rewiring.check_index`, for where an index comes in.
    Raises ValueError with what was found, what was expected and what to do.
    """
    weight, index = layer.weight, layer.index
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x is {_shape(x)}; expected floats [B, D]")
    if not len(x):
        raise ValueError("x is an empty batch (0 documents); leave such batches out")
    if weight.dim() != 2 or index.dim() != 2 or not weight.numel():
        raise ValueError(f"weight is {_shape(weight)} and index {_shape(index)}; expected [L, K] and [L / G, K]")
    labels, fan_in = weight.shape
    if layer.group < 1:
        raise ValueError(f"group is {layer.group}; expected 1 or more labels a group")
    if fan_in > FAN_IN_LIMIT and not plain:
        raise ValueError(f"fan-in {fan_in} is over the limit of {FAN_IN_LIMIT}; use a dense layer for labels that read so much")
    if fan_in > x.shape[1]:
        raise ValueError(f"fan-in {fan_in} is over the {x.shape[1]} features of x; indices in a row must be distinct")
    rows = -(-labels // layer.group)
    if tuple(index.shape) != (rows, fan_in):
        raise ValueError(
            f"index is {_shape(index)}; expected [{rows}, {fan_in}] for weight {_shape(weight)} in groups of {layer.group}"
        )
    learnt = layer.learnt
    if learnt is not None and not 0 <= learnt <= x.shape[1]:
        raise ValueError(f"learnt is {learnt}; expected 0 to {x.shape[1]}, the features of x")
    wide = (torch.float32, *_WIDER) if plain else (torch.float32,)
    _types("x", x, INPUT_TYPES + (_WIDER if plain else ()))
    _types("weight", weight, WEIGHT_TYPES + ((*_WIDER, torch.float16) if plain else ()))
    _types("index", index, INDEX_TYPES + (_INTEGERS if plain else ()))
    state = (
        ("bias", layer.bias, (labels,), wide),
        ("momentum", layer.momentum, (labels, fan_in), (*wide, torch.bfloat16)),
        ("bias_momentum", layer.bias_momentum, (labels,), wide),
        ("compensation", layer.compensation, (labels, fan_in), (torch.bfloat16,)),
    )
    if layer.compensation is not None and weight.itemsize >= 4:
        raise ValueError(f"compensation is for weights stored below float32, but weight is {weight.dtype}; leave it out")
    for name, value, shape, types in state:
        if value is not None:
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} is {_shape(value)}; expected {list(shape)}, for weight {_shape(weight)}")
            _types(name, value, types)
    present = [("weight", weight), ("index", index), *((name, value) for name, value, _, _ in state if value is not None)]
    for name, value in present:
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device} but x on {x.device}; move one of them")
        if not value.is_contiguous():
            raise ValueError(f"{name} is not contiguous (strides {value.stride()}); pass {name}.contiguous()")
    if not _in_range(index, x.shape[1]):
        _check_range(index, x.shape[1])


def check_positives(
    labels: Tensor, documents: Tensor, total: int, batch: int, device: torch.device, *, values: bool = False
) -> None:
    """(labels, documents) [P] int64 are places of [total labels, batch documents], on `device`.

    values: also that they are sorted by label, in range and each there once, which waits for the device.
    Raises ValueError as check_layer does.
    """
    for name, value in (("labels", labels), ("documents", documents)):
        if value.dim() != 1 or value.dtype != torch.int64:
            raise ValueError(f"{name} of the positives is {_shape(value)} {value.dtype}; expected int64 [P]")
        if value.device != device:
            raise ValueError(f"{name} of the positives is on {value.device} but x on {device}; move one of them")
        if not value.is_contiguous():
            raise ValueError(f"{name} of the positives is not contiguous; pass {name}.contiguous()")
    if len(labels) != len(documents):
        raise ValueError(f"{len(labels)} labels but {len(documents)} documents of positives; they are pairs")
    if not values or not len(labels):
        return
    for name, value, limit in (("label", labels, total), ("document", documents, batch)):
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"positives name {name} {low if low < 0 else high}; expected 0 to {limit - 1}")
    if bool((labels[1:] < labels[:-1]).any()):
        raise ValueError("labels of the positives are not sorted; sort the pairs by label")
    pairs = (labels * batch + documents).sort().values
    if bool((pairs[1:] == pairs[:-1]).any()):
        raise ValueError("a pair (label, document) is among the positives twice; give each once")


def check_gradient(g: Tensor, x: Tensor, layer: Layer) -> None:
    """g is dL/dz [B, L], beside x. Raises ValueError as check_layer does."""
    if tuple(g.shape) != (len(x), layer.labels) or g.device != x.device:
        raise ValueError(f"g is {_shape(g)} on {g.device}; expected {[len(x), layer.labels]} on {x.device}")


def check_depth(k: int, layer: Layer) -> None:
    """k of top-k. Raises ValueError."""
    if not 1 <= k <= layer.labels:
        raise ValueError(f"k is {k}; expected 1 to {layer.labels}, the number of labels")


def check_count(count: int) -> None:
    """How many candidates are asked for. Raises ValueError."""
    if count < 1:
        raise ValueError(f"count is {count}; expected 1 candidate a row or more")


def check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")


_SEEN: OrderedDict[int, tuple[StorageWeakRef, int, int, int, int]] = OrderedDict()
"""Of the last indices found in range: their storage, its version, D, and from which byte to which."""
_SEEN_LOCK = threading.Lock()  # threads may share a model, or run one each
_SEEN_MOST = 1024  # layers of all models in a process: beyond, each would be read again at every call


def _in_range(index: Tensor, features: int) -> bool:
    """Whether this index, or one that it is a part of, was found in range since it last changed.

    A change in place is seen by the tensor's version counter, which views share; an inference tensor has none.
    """
    if index.is_inference():
        return False
    storage = StorageWeakRef(index.untyped_storage())  # while it is held, no other storage gets this address
    start = index.storage_offset() * index.itemsize
    end = start + index.numel() * index.itemsize
    seen = _SEEN.get(storage.cdata)
    return seen is not None and seen[1:3] == (index._version, features) and seen[3] <= start and end <= seen[4]


def _check_range(index: Tensor, features: int) -> None:
    at_once = max(2**22 // index.shape[1], 1)
    for begin in range(0, len(index), at_once):
        rows = index[begin : begin + at_once].to(torch.int32)
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= features:
            wrong = low if low < 0 else high
            raise ValueError(f"index holds feature {wrong}; expected 0 to {features - 1}, for x has {features}")
    if not index.is_inference():
        storage = StorageWeakRef(index.untyped_storage())
        start = index.storage_offset() * index.itemsize
        with _SEEN_LOCK:
            for old in [key for key, seen in _SEEN.items() if seen[0].expired()]:
                del _SEEN[old]
            _SEEN[storage.cdata] = (storage, index._version, features, int(start), int(start) + index.nbytes)
            while len(_SEEN) > _SEEN_MOST:
                _SEEN.popitem(last=False)


def _types(name: str, value: Tensor, types: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in types:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in types)
        raise ValueError(f"{name} is {str(value.dtype).removeprefix('torch.')}; expected one of {names}")


def _shape(value: Tensor) -> str:
    return str(list(value.shape))
