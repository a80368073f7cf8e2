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
from fanin.kernels import Unavailable

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

__all__ = ["STORED", "Bottleneck", "Dense", "FixedFanIn", "Head", "build_head"]


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
    if settings.kind == "dense":
        stored = {"dtype": STORED[settings.dtype], "rounding": settings.rounding}
        return Dense(labels, width, settings.loss, generator, part=part, **stored)
    if settings.kind == "bottleneck":
        if part is not None and part != (0, labels):
            raise InputError(
                "head.kind: bottleneck cannot share its labels over processes (each would need the others' part of the "
                "projection's gradient); train it in one, or choose dense or fixed_fan_in"
            )
        return Bottleneck(labels, width, settings.bottleneck, settings.loss, generator)
    try:
        return FixedFanIn(
            labels,
            width,
            settings.fan_in,
            settings.group,
            settings.loss,
            generator,
            dtype=STORED[settings.dtype],
            rounding=settings.rounding,
            backend=settings.backend,
            part=part,
            lexical=settings.lexical,
            vocabulary=vocabulary,
            profiles=profiles,
            drawn=drawn,
        )
    except Unavailable as reason:
        raise InputError(f"head.backend: {reason}; set it to auto") from None
