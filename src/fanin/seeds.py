"""Random numbers that depend on what they are for alone: not on what was drawn before, nor on who draws them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """A seed for the purpose that these numbers, none negative, name."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def drawn_from(generator: torch.Generator | None) -> int:
    """A seed drawn from `generator` (None: torch's own), for the random numbers of many blocks."""
    return int(torch.randint(2**31, (1,), generator=generator, device="cpu"))


def blocks(first: int, last: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Rows first..last-1 of a whole, cut at multiples of `size`: each block's number, and its rows from and to.

    The rows are counted from `first`. However the whole is shared out, a block has one number.
    """
    for number in range(first // size, -(-last // size)):
        yield number, max(number * size, first) - first, min((number + 1) * size, last) - first


def uniform(seed: int, number: int, rows: slice, shape: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """`rows` of block `number`, whose rows are uniform in 0..1 [*shape]; all are drawn, so that each has its own.

    device: None for a CPU, or the meta device where that is torch's present default.
    """
    generator = torch.Generator(device or "cpu").manual_seed(seed_of(seed, number))
    return torch.rand(shape, generator=generator, device=device)[rows]
