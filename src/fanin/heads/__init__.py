"""The output layer with its own update rule. All heads share one protocol (`Head`), so the trainer knows none of them by name.

State lives in buffers; autograd sees none of it. The rows of a head are labels in the head's own order (see
`model.Classifier.order`).
"""

from __future__ import annotations

from typing import Any

import torch

from fanin.files import InputError
from fanin.heads.dense import Bottleneck, Dense
from fanin.heads.fixed_fan_in import FixedFanIn
from fanin.heads.head import Head
from fanin.heads.head_tail import HeadTail
from fanin.kernels import Unavailable

_WHOLE = {  # kinds that one process holds whole, and why
    "bottleneck": "each would need the others' part of the projection's gradient",
    "head_tail": "its dense rows would all be one process's",
}
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

__all__ = ["STORED", "Bottleneck", "Dense", "FixedFanIn", "Head", "HeadTail", "build_head", "sparse_part"]


def build_head(
    settings: Any,
    labels: int,
    width: int,
    generator: torch.Generator | None = None,
    part: tuple[int, int] | None = None,
    vocabulary: int = 0,
    profiles: int = 0,
    drawn: bool = True,
) -> Head:
    """The head that `config.Head` describes, with a random start; `part` as in `Head`, the last three as in `FixedFanIn`.

    Raises InputError where it cannot be built.
    """
    stored: dict[str, Any] = {"dtype": STORED[settings.dtype], "rounding": settings.rounding}
    if settings.kind == "dense":
        return Dense(labels, width, settings.loss, generator, part=part, **stored)
    if settings.kind in _WHOLE and part is not None and part != (0, labels):
        raise InputError(
            f"head.kind: {settings.kind} cannot share its labels over processes ({_WHOLE[settings.kind]}); train it in one, or "
            "choose dense or fixed_fan_in"
        )
    if settings.kind == "bottleneck":
        return Bottleneck(labels, width, settings.bottleneck, settings.loss, generator)
    sparse: dict[str, Any] = {"backend": settings.backend, "lexical": settings.lexical, "vocabulary": vocabulary}
    sparse |= {"profiles": profiles, "drawn": drawn, **stored}
    try:
        if settings.kind == "head_tail":
            dense = settings.dense_labels(labels)
            return HeadTail(labels, width, dense, settings.fan_in, settings.loss, generator, **sparse)
        return FixedFanIn(labels, width, settings.fan_in, settings.group, settings.loss, generator, part=part, **sparse)
    except Unavailable as reason:
        raise InputError(f"head.backend: {reason}; set it to auto") from None


def sparse_part(head: Head) -> FixedFanIn | None:
    """The head itself or the part of it that has a fixed fan-in, None where there is none."""
    return next((part for _, part in head.parts() if isinstance(part, FixedFanIn)), None)
