"""The fixed fan-in arithmetic: one small face (`Backend`), its implementations beside it, and one place that chooses.

`reference` is the semantics in plain torch; `cpu` is C++, compiled on first use; `triton` is for GPUs; `torch` is what is
left where the last two cannot run. This package imports torch and triton alone, and triton only when it is asked for.
"""

from __future__ import annotations

import functools
import warnings

import torch

from fanin.kernels.bag import Bag
from fanin.kernels.layer import WEIGHT_TYPES, Backend, Layer, Unavailable, Update
from fanin.kernels.reference import Reference

__all__ = ["BACKENDS", "Backend", "Layer", "Unavailable", "Update", "backend", "step_bytes"]

BACKENDS = ("reference", "torch", "cpu", "triton")


@functools.cache
def _load(name: str) -> Backend:
    if name == "cpu":
        from fanin.kernels.cpu import Cpu

        return Cpu()
    if name == "triton":
        from fanin.kernels.triton import Triton

        return Triton()
    return Bag() if name == "torch" else Reference()


def backend(name: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Backend:
    """The implementation called `name` for weights of `dtype` on `device`; `auto` is the fastest that runs there.

    Raises ValueError for an unknown name and Unavailable, with the reason, for one that cannot run here.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"kernel backend {name!r} is not one of auto, {', '.join(BACKENDS)}")
    kind = torch.device(device).type
    if name == "auto":
        return _fastest(kind) if dtype in WEIGHT_TYPES else _load("torch")
    if name in ("cpu", "triton") and dtype not in WEIGHT_TYPES:
        raise Unavailable(f"kernel backend {name} takes weights in float32, bfloat16 or float8_e4m3fn, found {dtype}; use auto")
    if name == "cpu" and kind != "cpu":
        raise Unavailable(f"kernel backend cpu works on a CPU, but the weights are on {kind}; use auto or triton")
    return _load(name)


def step_bytes(name: str, device: str, **shape: int) -> int:
    """`Backend.step_bytes` of the backend called `name` on `device`, also for a device that is not here."""
    if device != "cpu" and name in ("auto", "triton"):
        from fanin.kernels.triton.plan import step_bytes as planned

        return planned(**shape)
    return backend(name, device).step_bytes(**shape)


@functools.cache
def _fastest(kind: str) -> Backend:
    wanted = {"cpu": "cpu", "cuda": "triton"}.get(kind)
    if wanted is None:
        return _load("torch")
    try:
        return _load(wanted)
    except Unavailable as reason:
        warnings.warn(f"{reason}; falling back to slower kernels in plain torch", RuntimeWarning, stacklevel=3)
        return _load("torch")
