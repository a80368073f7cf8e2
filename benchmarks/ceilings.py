"""What this very machine can do: bytes copied a second, and multiplications a second in matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def _best(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the median round."""
    cuda = torch.cuda.is_available()
    taken = []
    for number in range(rounds + 2):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        if number >= 2:
            taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def _copy_rate(entries: int, device: str, rounds: int) -> float:
    source = torch.rand(entries, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), rounds)


def measure(rounds: int = 7) -> dict[str, float]:
    """copy: bytes read and written a second; gemm_fp32, gemm_bf16: floating-point operations a second, on random numbers.

    fp32 on a GPU is measured without tf32, as torch multiplies by default.
    """
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    rates = {"copy": _copy_rate((2**31 if cuda else 2**27) // 4, device, rounds)}
    size = 8192 if cuda else 1536
    for name, dtype in (("gemm_fp32", torch.float32), ("gemm_bf16", torch.bfloat16)):
        one, two = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        rates[name] = 2 * size**3 / _best(lambda one=one, two=two, out=out: torch.mm(one, two, out=out), rounds)
    return rates
