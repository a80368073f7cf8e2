"""The `triton` backend: fused kernels for GPUs. docs/kernels.md describes them.

Importing this package needs no Triton; making a `Triton` does.
"""

from __future__ import annotations

from fanin.kernels.triton.backend import Triton

__all__ = ["Triton"]
