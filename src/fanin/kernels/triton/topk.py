"""The second pass of top-k: the logits of a few chosen tiles a document."""

import triton
import triton.language as tl

from fanin.kernels.triton.storage import decode, place_of

LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32


@triton.jit(do_not_specialize=["total", "features", "choices"], do_not_specialize_on_alignment=["bias"])
def pick(
    x,  # [B, D] float32 or bfloat16
    weight,  # [total, fan_in] stored
    index,  # [groups, fan_in]
    bias,  # [total] or None
    chosen,  # [B, choices] int64: tiles
    out,  # [B, choices, tile] float32: -inf beyond the last label
    features,
    total,
    group,
    tile,
    fan_in,
    choices,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One document and one of its tiles, BLOCK_L labels at a time."""
    document = tl.program_id(0).to(tl.int64)
    place = place_of(document, choices) + tl.program_id(1)
    first = tl.load(chosen + place) * tile
    done = 0
    while done < tile:
        within = done + tl.arange(0, BLOCK_L)
        label = first + within
        inside = (within < tile) & (label < total)
        z = tl.zeros([BLOCK_L], tl.float32)
        begin = 0
        while begin < fan_in:
            k = begin + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (k < fan_in)[None, :]
            feature = tl.load(index + place_of(label // group, fan_in)[:, None] + k[None, :], mask=mask, other=0)
            w = decode(tl.load(weight + place_of(label, fan_in)[:, None] + k[None, :], mask=mask, other=0))
            value = tl.load(x + place_of(document, features) + feature.to(tl.int64), mask=mask, other=0)
            z += tl.sum(w * decode(value), 1)
            begin += BLOCK_K
        if bias is not None:
            z += tl.load(bias + label, mask=inside, other=0.0)
        z = tl.where(z < LOWEST, LOWEST, z)  # -inf is for what lies beyond the last label
        tl.store(out + place_of(place, tile) + within, tl.where(inside, z, float("-inf")), mask=within < tile)
        done += BLOCK_L
