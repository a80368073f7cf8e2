"""The kernels of layers whose labels share features in groups (G > 1).

Within a group the features gathered for one label serve all: a tile is a small dense layer, three matrix products of
[labels, K, documents], which tensor cores do. A group of more labels than a tile has is several tiles. A fan-in too large for
one block, or a batch, takes two kernels a step, with dL/dlogits written between them.
"""

import triton
import triton.language as tl

from fanin.kernels.triton.storage import decode, operand, place_of, product, rounded
from fanin.kernels.triton.update import LOGITS, MAXIMA, at_positives, loss_of, slope, update_bias, update_weights


@triton.jit
def _row(weight, index, row, begin, m, in_tile, k, fan_in, WHOLE_K: tl.constexpr):
    """One block of a tile's fan-in: which entries k there are, their features, and stored weights. WHOLE_K: the fan-in is
    whole blocks, so that no entry needs a mask."""
    in_row = tl.full(k.shape, True, tl.int1) if WHOLE_K else k < fan_in
    feature = tl.load(index + place_of(row, fan_in) + k, mask=in_row, other=0)
    mask = in_tile[:, None] & in_row[None, :]
    raw = tl.load(weight + place_of(begin, fan_in) + (m[:, None] * fan_in + k[None, :]), mask=mask, other=0)
    return in_row, feature, raw


@triton.jit
def _features(xt, feature, in_row, columns, stride):
    """Rows of xt for one block of documents."""
    return tl.load(xt + place_of(feature, stride)[:, None] + columns[None, :], mask=in_row[:, None], other=0)


@triton.jit
def _slopes(
    z, m, columns, in_tile, labels, documents, ranges, losses, tile, place, label, batch, LOSS: tl.constexpr
):  # fmt: skip
    """dL/dz of a tile whose first label is the positives' number `label`; the loss is stored at losses + place."""
    start, end = tl.load(ranges + tile), tl.load(ranges + tile + 1)
    if losses is not None:
        value = at_positives(
            loss_of(z, LOSS), z, m[:, None], columns[None, :], labels, documents, start, end, label, LOSS, False
        )
        value = tl.where(in_tile[:, None] & (columns < batch)[None, :], value, 0.0)
        tl.store(losses + place, tl.sum(tl.sum(value, 1), 0))
    return at_positives(slope(z, LOSS), z, m[:, None], columns[None, :], labels, documents, start, end, label, LOSS, True)


@triton.jit
def _add_dx(w, slopes, feature, in_row, dx_rows, dxt, tile, k, columns, fan_in, batch, stride, ATOMIC: tl.constexpr):
    """What one block of a tile's fan-in adds to dx. Pads of a row go nowhere, and pads of a tile have slope 0."""
    dx = product(tl.trans(w), slopes, tl.zeros([w.shape[1], slopes.shape[1]], tl.float32))
    if ATOMIC:
        target = dxt + place_of(feature, stride)[:, None] + columns[None, :]
        tl.atomic_add(target, dx, mask=in_row[:, None] & (columns < batch)[None, :], sem="relaxed")
    else:
        target = dx_rows + place_of(tile * fan_in, stride) + (k[:, None] * stride + columns[None, :])
        tl.store(target, rounded(dx, dx_rows), mask=in_row[:, None])


@triton.jit(
    do_not_specialize=["offset", "total", "batch", "maxima_stride"],
    do_not_specialize_on_alignment=["bias", "labels", "documents", "ranges", "losses"],
)
def grouped(
    xt,  # as in single.py, but for what is noted
    weight,
    index,  # [groups, fan_in]
    bias,
    labels,
    documents,
    ranges,
    g,  # [total, stride]: written by SLOPES
    out,
    losses,  # [tiles, column blocks] float32 or None
    offset,
    total,
    group,
    fan_in,
    batch,
    stride,
    maxima_stride,
    MODE: tl.constexpr,
    LOSS: tl.constexpr,
    TILES: tl.constexpr,  # tiles a group
    REPEAT: tl.constexpr,  # MAXIMA: tiles that make one maximum; else 1
    K_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WHOLE_K: tl.constexpr,  # the fan-in is whole blocks of BLOCK_K
):
    """The logits of one tile of labels with one block of documents, and what becomes of them."""
    columns = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    highest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    for repeat in tl.range(REPEAT, num_stages=1):
        tile = tl.program_id(0).to(tl.int64) * REPEAT + repeat
        row = tile // TILES
        begin = row * group + (tile % TILES) * BLOCK_M
        in_tile = begin + m < tl.minimum((row + 1) * group, total)
        if REPEAT > 1:
            row = tl.minimum(row, (total - 1) // group)  # the last maximum may be of fewer tiles
        z = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
        for block in tl.range(K_BLOCKS, num_stages=2):
            in_row, feature, raw = _row(weight, index, row, begin, m, in_tile, block * BLOCK_K + k, fan_in, WHOLE_K)
            z = product(operand(raw), _features(xt, feature, in_row, columns, stride), z)
        if bias is not None:
            z += tl.load(bias + begin + m, mask=in_tile, other=0)[:, None]
        if MODE == MAXIMA:
            highest = tl.maximum(highest, tl.max(tl.where(in_tile[:, None], z, float("-inf")), 0))
        elif MODE == LOGITS:
            here = place_of(begin, stride) + (m[:, None] * stride + columns[None, :])
            tl.store(out + here, z, mask=in_tile[:, None])
        else:
            place = tile * tl.num_programs(1) + tl.program_id(1)
            slopes = _slopes(
                z, m, columns, in_tile, labels, documents, ranges, losses, tile, place, offset + begin, batch, LOSS
            )  # fmt: skip
            here = place_of(begin, stride) + (m[:, None] * stride + columns[None, :])
            tl.store(g + here, rounded(slopes, xt), mask=in_tile[:, None])
    if MODE == MAXIMA:
        tl.store(out + place_of(columns, maxima_stride) + tl.program_id(0), highest, mask=columns < batch)


@triton.jit(
    do_not_specialize=["first", "offset", "total", "batch", "seed", "momentum_seed"],
    do_not_specialize_on_alignment=["bias", "bias_momentum", "labels", "documents", "ranges", "losses"],
)
def grouped_step(
    xt,  # as above, but for what is noted
    weight,
    index,
    bias,
    momentum,
    bias_momentum,
    compensation,
    labels,
    documents,
    ranges,
    dx_rows,  # [tiles * fan_in, stride]: what each tile adds to dx; None if ATOMIC
    dxt,
    losses,  # [tiles] float32 or None
    lr,
    mu,
    decay,
    scale,
    seed,
    momentum_seed,
    first,
    offset,
    total,
    group,
    fan_in,
    batch,
    stride,
    LOSS: tl.constexpr,
    ATOMIC: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # the whole fan-in
    BLOCK_B: tl.constexpr,  # the whole batch
    WHOLE_K: tl.constexpr,
    WHOLE_B: tl.constexpr,  # the batch has BLOCK_B documents
):
    """A training step of one tile of labels, over all documents: all of it but the sum of dx."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile // TILES
    begin = row * group + (tile % TILES) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    in_tile = begin + m < tl.minimum((row + 1) * group, total)
    in_row, feature, raw = _row(weight, index, row, begin, m, in_tile, k, fan_in, WHOLE_K)
    w = operand(raw)
    columns = tl.arange(0, BLOCK_B)
    x = _features(xt, feature, in_row, columns, stride)
    z = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
    # one turn, unknown to the compiler: it would have warps make z twice, for the products that follow
    for _ in tl.range(tl.cdiv(fan_in, BLOCK_K), num_stages=1):
        z = product(w, x, z)
    if bias is not None:
        z += tl.load(bias + begin + m, mask=in_tile, other=0)[:, None]
    # pads of a tile have weights of 0, and pads of the batch x of 0: their slopes reach no sum but the bias's
    slopes = _slopes(z, m, columns, in_tile, labels, documents, ranges, losses, tile, tile, offset + begin, batch, LOSS)
    short = rounded(slopes, xt)
    if bias is not None:
        own = slopes if WHOLE_B else tl.where((columns < batch)[None, :], slopes, 0.0)
        update_bias(tl.sum(own, 1), bias, bias_momentum, begin + m, in_tile, lr, mu, scale)
    _add_dx(w, short, feature, in_row, dx_rows, dxt, tile, k, columns, fan_in, batch, stride, ATOMIC)
    update_weights(
        product(short, tl.trans(x), tl.zeros([BLOCK_M, BLOCK_K], tl.float32)),
        raw, weight, momentum, compensation, place_of(begin, fan_in), m[:, None] * fan_in + k[None, :],
        in_tile[:, None] & in_row[None, :], place_of(first + begin, fan_in), lr, mu, decay, scale, seed, momentum_seed,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["first", "total", "batch", "seed", "momentum_seed"],
    do_not_specialize_on_alignment=["bias", "bias_momentum"],
)
def grouped_backward(
    xt,  # as above, but for what is noted
    weight,
    index,
    bias,
    momentum,
    bias_momentum,
    compensation,
    g,  # [total, stride]: read
    dx_rows,  # None: not wanted, or ATOMIC
    dxt,
    out,  # dL/dweight [total, fan_in] float32, written if not UPDATE; None: not wanted
    lr,
    mu,
    decay,
    scale,
    seed,
    momentum_seed,
    first,
    total,
    group,
    fan_in,
    batch,
    stride,
    ATOMIC: tl.constexpr,
    UPDATE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WHOLE_K: tl.constexpr,  # the fan-in is whole blocks of BLOCK_K
    WHOLE_B: tl.constexpr,  # the batch is whole blocks of BLOCK_B
):
    """One tile of labels and one block of its fan-in, over all documents, from given slopes: gradients, or the update."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile // TILES
    begin = row * group + (tile % TILES) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_tile = begin + m < tl.minimum((row + 1) * group, total)
    dw = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_M], tl.float32)
    column = 0
    while column < batch:
        columns = column + tl.arange(0, BLOCK_B)
        here = place_of(begin, stride) + (m[:, None] * stride + columns[None, :])
        slopes = tl.load(g + here, mask=in_tile[:, None], other=0)
        in_row, feature, raw = _row(weight, index, row, begin, m, in_tile, k, fan_in, WHOLE_K)
        x = _features(xt, feature, in_row, columns, stride)
        if UPDATE and bias is not None:
            db += tl.sum(decode(slopes) if WHOLE_B else tl.where((columns < batch)[None, :], decode(slopes), 0.0), 1)
        if UPDATE or out is not None:
            dw = product(slopes, tl.trans(x), dw)
        if ATOMIC or dx_rows is not None:
            _add_dx(operand(raw), slopes, feature, in_row, dx_rows, dxt, tile, k, columns, fan_in, batch, stride, ATOMIC)
        column += BLOCK_B
    offset = m[:, None] * fan_in + k[None, :]
    mask = in_tile[:, None] & (k < fan_in)[None, :]
    if UPDATE:
        update_weights(
            dw, tl.load(weight + place_of(begin, fan_in) + offset, mask=mask, other=0),
            weight, momentum, compensation, place_of(begin, fan_in), offset, mask, place_of(first + begin, fan_in),
            lr, mu, decay, scale, seed, momentum_seed,
        )  # fmt: skip
        if bias is not None:
            update_bias(db, bias, bias_momentum, begin + m, in_tile & (tl.program_id(1) == 0), lr, mu, scale)
    elif out is not None:
        tl.store(out + place_of(begin, fan_in) + offset, dw, mask=mask)
