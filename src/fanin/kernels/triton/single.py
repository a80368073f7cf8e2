"""The kernel of layers whose labels each have features of their own (G = 1).

A label needs K rows of xt [D, B], and nothing can be shared between labels: it is a gather, held by the L1 cache and not by
arithmetic. So each tile of gathered features stays in registers from the logits to the weights' gradient, and one warp
works on one label where it can, which spares shared memory and barriers.
"""

import triton
import triton.language as tl

from fanin.kernels.triton.storage import decode, place_of, rounded
from fanin.kernels.triton.update import (
    BACKWARD,
    LOGITS,
    MAXIMA,
    STEP,
    at_positives,
    end_of_run,
    loss_of,
    slope,
    update_bias,
    update_weights,
)


@triton.jit(
    do_not_specialize=["first", "offset", "total", "batch", "seed", "momentum_seed", "maxima_stride"],
    do_not_specialize_on_alignment=["bias", "bias_momentum", "labels", "documents", "ranges", "losses"],
)
def single(
    xt,  # [D, stride] float32 or bfloat16; columns from `batch` on are zeros
    weight,  # [total, fan_in] stored; so are momentum, compensation and old
    index,  # [total, fan_in]
    bias,  # [total] or None
    momentum,
    bias_momentum,
    compensation,
    labels,  # the positives of the whole layer, int64; STEP alone
    documents,
    ranges,  # where each tile's positives begin, from this chunk's first tile on
    g,  # [total, stride]: written by STEP, read by BACKWARD
    old,  # written by STEP: the weights from before
    dxt,  # [D, stride] float32: added to by STEP and BACKWARD if ATOMIC
    out,  # float32: LOGITS [total, stride]; MAXIMA [batch, maxima_stride]; BACKWARD dL/dweight [total, fan_in], or None
    losses,  # [tiles] float32 or None
    lr,
    mu,
    decay,
    scale,
    seed,
    momentum_seed,
    first,  # this chunk's first label in the layer that the random bits count in
    offset,  # ... and in the layer that the positives count in
    total,  # labels in this chunk
    fan_in,
    batch,
    stride,
    maxima_stride,
    MODE: tl.constexpr,
    LOSS: tl.constexpr,
    ATOMIC: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WHOLE_B: tl.constexpr,  # the batch is whole blocks of BLOCK_B
):
    """One tile of BLOCK_L labels, one after another; over all documents (STEP, BACKWARD) or one block of them."""
    tile = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    in_row = k < fan_in
    column_begin = tl.program_id(1) * BLOCK_B
    column_end = batch
    if MODE == LOGITS or MODE == MAXIMA:  # noqa: SIM109 (Triton has no `in`)
        column_end = tl.minimum(batch, column_begin + BLOCK_B)
    label = tile * BLOCK_L
    label_end = tl.minimum(label + BLOCK_L, total)
    if MODE == STEP:
        positive = tl.load(ranges + tile)
        positives_end = tl.load(ranges + tile + 1)
        gradients = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        bias_gradients = tl.zeros([BLOCK_L], tl.float32)
    i = tl.arange(0, BLOCK_L)
    loss = tl.zeros([BLOCK_B], tl.float32)
    highest = tl.full([BLOCK_B], float("-inf"), tl.float32)

    # a label's row is asked for while the one before is worked on: it comes from memory, the features from a cache
    begin = place_of(label, fan_in)
    next_feature = tl.load(index + begin + k, mask=in_row, other=0)
    next_raw = tl.load(weight + begin + k, mask=in_row, other=0)
    next_c = 0.0
    if bias is not None:
        next_c = tl.load(bias + label)
    while label < label_end:
        begin = place_of(label, fan_in)
        feature, raw, c = next_feature, next_raw, next_c
        more = in_row & (label + 1 < label_end)
        next_feature = tl.load(index + begin + fan_in + k, mask=more, other=0)
        next_raw = tl.load(weight + begin + fan_in + k, mask=more, other=0)
        if bias is not None:
            next_c = tl.load(bias + label + 1, mask=label + 1 < label_end, other=0.0)
        w = decode(raw)
        if MODE == STEP:
            next_positive = end_of_run(labels, positive, positives_end, offset + label)
        dw = tl.zeros([BLOCK_K], tl.float32)
        db = 0.0
        column = column_begin
        while column < column_end:
            columns = column + tl.arange(0, BLOCK_B)
            # pads of a row read feature 0 with weight 0
            x = decode(tl.load(xt + place_of(feature, stride)[:, None] + columns[None, :]))
            here = place_of(label, stride) + columns
            if MODE == BACKWARD:
                slopes = decode(tl.load(g + here))
            else:
                z = tl.sum(w[:, None] * x, 0) + c
                if MODE == LOGITS:
                    tl.store(out + here, z)
                elif MODE == MAXIMA:
                    highest = tl.maximum(highest, z)
                else:
                    if losses is not None:
                        value = at_positives(
                            loss_of(z, LOSS), z, columns * 0, columns, labels, documents, positive, next_positive,
                            offset + label, LOSS, False,
                        )  # fmt: skip
                        loss += tl.where(columns < batch, value, 0.0)
                    slopes = at_positives(
                        slope(z, LOSS), z, columns * 0, columns, labels, documents, positive, next_positive,
                        offset + label, LOSS, True,
                    )  # fmt: skip
                    if not WHOLE_B:
                        slopes = tl.where(columns < batch, slopes, 0.0)
                    db += tl.sum(slopes, 0)
                    if not ATOMIC:
                        tl.store(g + here, rounded(slopes, g))
            if MODE == STEP or MODE == BACKWARD:  # noqa: SIM109
                dw += tl.sum(slopes[None, :] * x, 1)
                if ATOMIC:
                    target = dxt + place_of(feature, stride)[:, None] + columns[None, :]
                    read = in_row[:, None] & (columns < batch)[None, :]
                    tl.atomic_add(target, w[:, None] * slopes[None, :], mask=read, sem="relaxed")
            column += BLOCK_B
        if MODE == BACKWARD and out is not None:
            tl.store(out + begin + k, dw, mask=in_row)
        if MODE == STEP:
            # kept for all labels of the tile: to update one at a time would do each weight in many lanes
            gradients = tl.where((tile * BLOCK_L + i == label)[:, None], dw[None, :], gradients)
            bias_gradients = tl.where(tile * BLOCK_L + i == label, db, bias_gradients)
            positive = next_positive
        label += 1

    if MODE == MAXIMA:
        columns = column_begin + tl.arange(0, BLOCK_B)
        tl.store(out + place_of(columns, maxima_stride) + tile, highest, mask=columns < batch)
    if MODE == STEP:
        own = tile * BLOCK_L + i
        begin = place_of(tile * BLOCK_L, fan_in)
        offset = i[:, None] * fan_in + k[None, :]
        mask = (own < total)[:, None] & in_row[None, :]
        raw = tl.load(weight + begin + offset, mask=mask, other=0)
        if not ATOMIC:
            tl.store(old + begin + offset, raw, mask=mask)
        update_weights(
            gradients, raw, weight, momentum, compensation, begin, offset, mask, begin + place_of(first, fan_in),
            lr, mu, decay, scale, seed, momentum_seed,
        )  # fmt: skip
        if bias is not None:
            update_bias(bias_gradients, bias, bias_momentum, own, own < total, lr, mu, scale)
        if losses is not None:
            tl.store(losses + tile, tl.sum(loss, 0))
