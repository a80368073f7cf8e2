"""The launch configurations that ship, one for each shape: no autotuning, so no first-call delay and no run-to-run change.

Chosen from what ahead-of-time compilation reports (aot.py) and from counting bytes (docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import dataclass

SCRATCH_BYTES = 256 * 2**20
"""What one launch hands to the next: a step's chunk of labels is as long as fits. Longer chunks are faster on an H200, though
not much: no chunk that fills the GPU stays in its L2 cache, and each launch costs Python some 100 microseconds."""
PARTIAL_BYTES = 64 * 2**20
"""All partial sums of dx; at least one is always made."""
TOPK_LABELS = 2**23
"""Labels whose tiles' maxima are held at once."""
PICK_BYTES = 2**28
"""Logits of chosen tiles held at once: larger batches go by in turns."""


@dataclass(frozen=True)
class Single:
    """G = 1. A program works through BLOCK_L labels with [BLOCK_K, BLOCK_B] gathered features each.

    registers: as in Grouped.
    """

    block_l: int
    block_k: int
    block_b: int
    warps: int
    registers: int | None = None


@dataclass(frozen=True)
class Grouped:
    """G > 1. A tile is [block_m labels, block_b documents], and block_k of its fan-in at a time.

    registers: a thread's limit, which lets more blocks share a multiprocessor; None: the compiler's choice.
    """

    block_m: int
    block_k: int
    block_b: int
    warps: int
    registers: int | None


@dataclass(frozen=True)
class Reduce:
    """A program adds the rows of block_f features for block_b documents, turns x block_e of each at a time.

    A warp has a feature of its own: then no sum goes through shared memory. registers: as in Grouped.
    """

    block_f: int
    block_e: int
    block_b: int
    turns: int
    warps: int
    registers: int | None = None


@dataclass(frozen=True)
class Spread:
    """A program makes tiles of [block_l labels, block_d features], block_k of a row at a time, for block_b documents."""

    block_l: int
    block_k: int
    block_d: int
    block_b: int
    warps: int
    registers: int | None = None


def options(config: Single | Grouped | Reduce | Spread, capped: bool = True) -> dict[str, int]:
    """What a launch is given beside its arguments. capped: with the configuration's limit on registers (decoding float8 in a
    loop over documents takes more, and so does the loss)."""
    registers = config.registers if capped else None
    return {"num_warps": config.warps} | ({} if registers is None else {"maxnreg": registers})


def single(fan_in: int, batch: int) -> Single:
    """2,048 gathered features a warp are 64 registers a thread, and leave room for twelve warps a multiprocessor."""
    block_k = power_of_two(fan_in, 8)
    block_b = min(power_of_two(batch, 16), 64 if block_k <= 128 else 32)
    return Single(16, block_k, block_b, min(max(block_k * block_b // 2048, 1), 8))


def grouped(fan_in: int, group: int, batch: int, wide: bool, capability: int) -> Grouped:
    """wide: float32 arithmetic, whose operands, split in high and low parts, take four times the registers.

    capability: 80, 90 and so on, 0 for what is not NVIDIA's. From 90 on the operands of a matrix product stay in shared
    memory, so that 128 registers are enough and two blocks share a multiprocessor, and up to 128 features are gathered once
    for all three products (a fifth faster than twice 64 on an H200); before, a warp holds all of the second operand.
    """
    hopper = capability >= 90
    block_m = min(power_of_two(group, 16), 32 if wide else 64)
    block_k = min(power_of_two(fan_in, 16), 64 if wide else 128 if hopper else 32)
    block_b = min(power_of_two(batch, 16), 32 if wide else 128)
    largest = max(block_m * block_b, block_k * block_b, block_m * block_k)  # of the three accumulators
    warps = 8 if largest >= (2048 if wide else 8192) else 4
    return Grouped(block_m, block_k, block_b, warps, 128 if hopper and warps == 8 and not wide else None)


def reduce(group: int, block_b: int) -> Reduce:
    """G = 1: programs so large that one has a multiprocessor, and its L1 cache, for itself. G > 1: each row is read once."""
    if group == 1:
        block_b = min(block_b, 64)
        return Reduce(16, 256 // block_b, block_b, 32 * block_b // 256, 16)
    block_b = min(block_b, 128)
    return Reduce(4, 256 // block_b, block_b, 32 * block_b // 256, 4)


def spread(fan_in: int, stride: int, wide: bool, capability: int) -> Spread:
    """stride: documents in whole blocks of `single`, which whole blocks of these divide."""
    hopper = capability >= 90
    block_b = next(size for size in (128, 64, 32, 16) if stride % size == 0 and size <= (64 if wide or not hopper else 128))
    block_l, block_d = (32, 64) if wide else (64, 128 if hopper else 64)
    warps = 8 if block_b * block_d >= 4096 else 4
    return Spread(block_l, power_of_two(min(fan_in, 16), 8), block_d, block_b, warps, 128 if hopper and not wide else None)


PICK = (16, 64, 4)
"""Labels and features at once, and warps, of top-k's second pass."""
TOPK_TILE = 64


def power_of_two(value: int, least: int) -> int:
    """The lowest power of two that is no less than `value` and `least`."""
    return max(1 << (value - 1).bit_length(), least)
