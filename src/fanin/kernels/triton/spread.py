"""dx of layers whose labels each have features of their own (G = 1), where a row reads a fair part of them.

Some labels and some features at a time, the sparse rows are spread out to a small dense tile, and dx is its product with
dL/dlogits, by tensor cores. Most of that multiplies zeros; a gather of the rows that each feature needs (reduce.py) takes
several times as long all the same, for it waits on memory at every list. Every sum has a fixed order.
"""

import triton
import triton.language as tl

from fanin.kernels.triton.storage import operand, place_of, product


@triton.jit(do_not_specialize=["total", "features"])
def spread(
    g,  # [total, stride] float32 or bfloat16: dL/dlogits
    weight,  # [total, fan_in] stored: what g is multiplied with
    index,  # [total, fan_in]
    scratch,  # [programs, BLOCK_L, BLOCK_D] like g: a tile for each program
    partial,  # [slices, features, stride] float32, added to
    total,  # labels
    features,  # that dx is wanted of, the first ones; index may hold others
    fan_in,
    stride,
    K_BLOCKS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One slice's labels, BLOCK_D features, one block of documents."""
    slices, runs = tl.num_programs(0), tl.num_programs(1)
    begin = tl.program_id(1) * BLOCK_D
    d = tl.arange(0, BLOCK_D)
    columns = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_L)
    number = (tl.program_id(2) * runs + tl.program_id(1)).to(tl.int64) * slices + tl.program_id(0)
    tile = scratch + place_of(number, BLOCK_L * BLOCK_D)
    inside = row[:, None] * BLOCK_D + d[None, :]
    zeros = tl.zeros([BLOCK_L, BLOCK_D], scratch.dtype.element_ty)
    here = (begin + d)[:, None] * stride + columns[None, :]
    target = partial + place_of(tl.program_id(0).to(tl.int64) * features, stride)
    wanted = (begin + d < features)[:, None]
    dx = tl.load(target + here, mask=wanted, other=0.0)
    first = tl.program_id(0).to(tl.int64) * BLOCK_L
    while first < total:
        there = first + row < total
        tl.store(tile + inside, zeros)
        tl.debug_barrier()
        for block in tl.range(K_BLOCKS, num_stages=1):
            kk = block * BLOCK_K + k
            mask = there[:, None] & (kk < fan_in)[None, :]
            entry = row[:, None] * fan_in + kk[None, :]
            place = tl.load(index + place_of(first, fan_in) + entry, mask=mask, other=0).to(tl.int32) - begin
            w = operand(tl.load(weight + place_of(first, fan_in) + entry, mask=mask, other=0))
            own = mask & (place >= 0) & (place < BLOCK_D) & (begin + place < features)
            tl.store(tile + row[:, None] * BLOCK_D + place, stored(w, scratch), mask=own)
        tl.debug_barrier()
        slopes = tl.load(g + place_of(first, stride) + (row[:, None] * stride + columns[None, :]), mask=there[:, None], other=0)
        dx = product(tl.trans(tl.load(tile + inside)), slopes, dx)
        tl.debug_barrier()  # the tile has been read, and may be another one's
        first += slices * BLOCK_L
    tl.store(target + here, dx, mask=wanted)


@triton.jit
def stored(w, like):
    """`operand`s as the scratch keeps them: the interpreter's bfloat16 are integers in memory and float32 in hand."""
    if like.dtype.element_ty == tl.int16:
        return (w.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        return w
