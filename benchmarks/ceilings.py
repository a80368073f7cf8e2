"""What this very machine can do: bytes copied a second, and operations a second in matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ceiling:
    """A call that runs at a ceiling, and its work: bytes read and written, or floating-point operations."""

    call: Callable[[], object]
    work: float


def ceilings() -> dict[str, Ceiling]:
    """copy; gemm_fp32 and gemm_bf16 on random numbers (fp32 on a GPU without tf32, as torch multiplies by default).

    They are calls, not rates, so that a benchmark can time them in turns with its sides: a machine's clock changes with what
    it does, and shared machines change with what their neighbours do.
    """
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    source = torch.rand((2**31 if cuda else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy": Ceiling(lambda: target.copy_(source), 2.0 * source.nbytes)}
    size = 8192 if cuda else 1024
    for name, dtype in (("gemm_fp32", torch.float32), ("gemm_bf16", torch.bfloat16)):
        one, two = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        found[name] = Ceiling(lambda one=one, two=two, out=out: torch.mm(one, two, out=out), 2.0 * size**3)  # type: ignore[misc]
    return found
