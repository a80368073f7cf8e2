"""The `cpu` backend: C++ (fixed_fan_in.cpp and its headers) that reads torch's memory in place.

Weights float32, bfloat16 or float8_e4m3fn; as many threads as torch.get_num_threads(). The same result, bit for bit, whatever
that number is. Arithmetic in float32; but where the processor has units for bfloat16 (AVX-512), a step of groups stored in
bfloat16 or float8 rounds x and dL/dz to bfloat16 and sums their products in float32, as the `triton` backend does.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fanin.kernels.checks import check_count, check_depth, check_gradient, check_layer, check_loss, check_positives
from fanin.kernels.cpu.build import library
from fanin.kernels.layer import LOSSES, Backend, Layer, Update, without_lowest

_LINE, _PANEL = 16, 64  # LINE and PANEL in scratch.h
_MODES = {"step": 0, "logits": 1, "gradients": 2, "maxima": 3, "candidates": 4}
_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3, torch.uint16: 4, torch.int32: 5}
_SLICE, _SLICES = 4096, 64  # labels that are worth a slice; at most so many slices
_DX_BYTES = 2**26  # of all slices' dx together
_TILE = 32  # labels of which top-k first keeps only the best
_TOPK_LABELS = 2**20  # searched at once


class _Job(ctypes.Structure):
    """`Job` in job.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("mode", "threads", "labels", "features", "fan_in", "group", "batch")),
        *((name, ctypes.c_int64) for name in ("first", "slices", "tile", "learnt")),
        *((name, ctypes.c_void_p) for name in ("x", "dx", "present", "weight")),
        ("weight_type", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("index_type", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias", "momentum")),
        ("momentum_type", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias_momentum", "compensation", "positive_labels", "positive_documents")),
        ("positives", ctypes.c_int64),
        ("loss", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("losses", "z", "dweight", "candidates")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("lr", "momentum_factor", "decay", "scale")),
        *((name, ctypes.c_uint32) for name in ("weight_seed", "momentum_seed")),
    ]


class Cpu(Backend):
    name = "cpu"

    def __init__(self) -> None:
        """Compiles on first use. Raises Unavailable, with the reason, where that cannot be done."""
        self._library = library()
        self.bfloat16_units = bool(self._library.fanin_bfloat16_units())

    def step(
        self,
        x: Tensor,
        layer: Layer,
        labels: Tensor,
        documents: Tensor,
        update: Update,
        loss: str = "bce",
        want_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        check_loss(loss)
        check_layer(x, layer)
        check_positives(labels, documents, layer.labels, len(x), x.device, values=True)
        panels = _panels(x)
        job = _job("step", len(x), x.shape[1], layer, panels)
        dx = _empty(job.slices, panels.numel() // x.shape[1] * job.learnt)
        if layer.group == 1 and job.learnt < x.shape[1]:
            present = torch.ones(x.shape[1], dtype=torch.bool, device="cpu")
            given = x[:, job.learnt :].t()
            present[job.learnt :] = (given.amax(1) != 0) | (given.amin(1) != 0)
            job.present = _address(present)
        losses = _empty(job.slices, dtype=torch.float64) if want_loss else None
        job.dx, job.losses = _address(dx), _address(losses)
        job.momentum, job.momentum_type = _address(layer.momentum), _type(layer.momentum)
        job.bias_momentum, job.compensation = _address(layer.bias_momentum), _address(layer.compensation)
        job.positive_labels, job.positive_documents, job.positives = _address(labels), _address(documents), len(labels)
        job.loss = LOSSES.index(loss)
        job.lr, job.momentum_factor = update.lr, update.momentum
        job.decay, job.scale = update.weight_decay, update.scale
        job.weight_seed, job.momentum_seed = update.seeds()
        self._run(job)
        return _rows(dx[0], x[:, : job.learnt]), None if losses is None else losses.sum()

    def step_bytes(self, *, labels: int, features: int, fan_in: int, group: int, batch: int, learnt: int | None = None) -> int:
        learnt = features if learnt is None else learnt
        rows = -(-batch // _LINE) * _LINE
        panels = rows * learnt
        turned = rows * (features - learnt)
        return 4 * (panels * (1 + _slices(labels, panels) + 1) + batch * learnt + turned)

    def logits(self, x: Tensor, layer: Layer) -> Tensor:
        check_layer(x, layer)
        panels = _panels(x)
        z = _empty(layer.labels, len(x))
        job = _job("logits", len(x), x.shape[1], layer, panels)
        job.z = _address(z)
        self._run(job)
        return z.t().to(x.dtype)

    def gradients(
        self, x: Tensor, g: Tensor, layer: Layer, need_x: bool = True, need_weight: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        check_layer(x, layer)
        check_gradient(g, x, layer)
        if not (need_x or need_weight):
            return None, None
        panels = _panels(x)
        weight = _empty(*layer.weight.shape) if need_weight else None
        total = _empty(panels.numel()).zero_() if need_x else None
        for part in layer.parts(max(_TOPK_LABELS // max(len(x), 1), 4096)):  # g is turned round in runs of labels
            place = slice(part.first - layer.first, part.first - layer.first + part.labels)
            turned = g[:, place].t().to(torch.float32).contiguous()
            job = _job("gradients", len(x), x.shape[1], part, panels)
            dx = _empty(job.slices, panels.numel()) if need_x else None
            job.dx, job.z = _address(dx), _address(turned)
            job.dweight = None if weight is None else _address(weight[place])
            self._run(job)
            if total is not None and dx is not None:
                total += dx[0]
        return (
            None if total is None else _rows(total, x),
            None if weight is None else weight.to(x.dtype),
        )

    def topk(self, x: Tensor, layer: Layer, k: int) -> tuple[Tensor, Tensor]:
        """As Backend.topk. The k best labels of a document lie in the k tiles of labels whose best are the highest, so
        only the tiles' maxima are kept, and the logits of those k tiles are computed again."""
        check_layer(x, layer)
        check_depth(k, layer)
        panels, rows = _panels(x), x.detach().to(torch.float32).contiguous()
        batch = len(x)
        scores, found = _empty(batch, 0), _empty(batch, 0, dtype=torch.int64)
        tile = -(-_TILE // layer.group) * layer.group
        for part in layer.parts(max(_TOPK_LABELS // tile, k) * tile):
            tiles = -(-part.labels // tile)
            maxima = _empty(tiles, batch)
            job = _job("maxima", batch, x.shape[1], part, panels, tile)
            job.z = _address(maxima)
            self._run(job)
            chosen = maxima.t().topk(min(k, tiles), dim=1).indices.sort(dim=1).values
            logits = _empty(batch, chosen.shape[1] * tile)
            self._library.fanin_pick(
                ctypes.byref(job),
                ctypes.c_void_p(_address(rows)),
                ctypes.c_void_p(_address(chosen)),
                ctypes.c_int64(chosen.shape[1]),
                ctypes.c_void_p(_address(logits)),
            )
            top, where = logits.topk(min(k, part.labels), dim=1)
            where = chosen.gather(1, where // tile) * tile + where % tile + (part.first - layer.first)
            scores, found = torch.cat([scores, top], 1), torch.cat([found, where], 1)
            scores, keep = scores.topk(min(k, scores.shape[1]), dim=1)
            found = found.gather(1, keep)
        return without_lowest(scores).to(x.dtype), found

    def candidates(self, x: Tensor, layer: Layer, labels: Tensor, documents: Tensor, count: int, loss: str = "bce") -> Tensor:
        check_loss(loss)
        check_layer(x, layer)
        check_positives(labels, documents, layer.labels, len(x), x.device, values=True)
        check_count(count)
        panels = _panels(x)
        found = _empty(len(layer.index), count, dtype=torch.int32)
        job = _job("candidates", len(x), x.shape[1], layer, panels)
        job.positive_labels, job.positive_documents, job.positives = _address(labels), _address(documents), len(labels)
        job.loss, job.candidates, job.count = LOSSES.index(loss), _address(found), count
        self._run(job)
        return found

    def _run(self, job: _Job) -> None:
        self._library.fanin_run(ctypes.byref(job))


def _job(mode: str, batch: int, features: int, layer: Layer, panels: Tensor, tile: int | None = None) -> _Job:
    tile = tile or layer.group
    learnt = layer.learnt if layer.learnt is not None and mode == "step" else features
    size = panels.numel() // features * learnt if mode in ("step", "gradients") else 0
    slices = _slices(layer.labels, size)
    return _Job(
        mode=_MODES[mode],
        threads=torch.get_num_threads(),
        labels=layer.labels,
        features=features,
        fan_in=layer.fan_in,
        group=layer.group,
        batch=batch,
        first=layer.first,
        slices=min(slices, -(-layer.labels // tile)),
        tile=tile,
        learnt=learnt,
        x=_address(panels),
        weight=_address(layer.weight),
        weight_type=_TYPES[layer.weight.dtype],
        index=_address(layer.index),
        index_type=_TYPES[layer.index.dtype],
        bias=_address(layer.bias),
    )


def _slices(labels: int, size: int) -> int:
    """Runs of labels that are worked on at once, each with a dx of `size` numbers: a function of the shapes alone, so that
    sums do not depend on the number of threads."""
    return max(min(labels // _SLICE, _SLICES, _DX_BYTES // (4 * size) if size else _SLICES), 1)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """For the C++ code to write to, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _type(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _TYPES[tensor.dtype]


def _panels(x: Tensor) -> Tensor:
    """x [B, D] -> flat panels of up to 64 documents, each [D, columns], filled with zeros to whole vectors."""
    xt = x.detach().t().to(torch.float32)
    if len(x) % _LINE:
        xt = torch.nn.functional.pad(xt, (0, -len(x) % _LINE))
    if xt.shape[1] <= _PANEL:
        return xt.reshape(-1)
    return torch.cat([part.reshape(-1) for part in xt.split(_PANEL, dim=1)])


def _rows(panels: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_panels`: [B, D], in the type of `like`."""
    batch, features = like.shape
    padded = -(-batch // _LINE) * _LINE
    parts = panels.split([features * min(_PANEL, padded - start) for start in range(0, padded, _PANEL)])
    xt = torch.cat([part.view(features, -1) for part in parts], dim=1)
    return xt.t()[:batch].to(like.dtype).contiguous()
