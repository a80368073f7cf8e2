"""The deterministic sum of dx: no atomics, every feature's terms added in a fixed order.

A layer's index entries are cut in blocks, and within a block sorted by feature once (order.py). Then each feature's
terms are a short list of places, whose rows are gathered and added:
    G = 1: row l of g [labels, documents], times the weight at the place;
    G > 1: the row of dx_rows that the grouped kernel wrote for the place.
"""

import triton
import triton.language as tl

from fanin.kernels.triton.storage import decode, place_of


@triton.jit(do_not_specialize=["blocks", "features", "feature_run"], do_not_specialize_on_alignment=["starts", "longest"])
def reduce(
    source,  # G = 1: g [labels, stride]; else dx_rows [groups * TILES * fan_in, stride]
    weight,  # G = 1: the stored weights [labels, fan_in] that g is multiplied with; else None
    order,  # [blocks, entries]: each block's places by feature
    starts,  # [blocks, features + 1]: where each feature's places begin in `order`, within the block
    longest,  # [blocks, ceil(features / RUN)]: the longest list of each RUN features
    partial,  # [slices, features, stride] float32, added to
    blocks,
    entries,  # places a block
    features,
    feature_run,  # features a program works through
    stride,
    RUN: tl.constexpr,  # a multiple of BLOCK_F
    FAN_IN: tl.constexpr,  # places are divided by it
    TILES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TURNS: tl.constexpr,  # times BLOCK_E places whose rows are asked for together
):
    """One slice's blocks, one run of features, one block of documents.

    A block's features follow each other, so that for G = 1 its rows of g are read again from the L1 cache.
    """
    slices = tl.num_programs(0)
    columns = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    run = tl.program_id(1) * feature_run
    end = tl.minimum(run + feature_run, features)
    target = partial + place_of(tl.program_id(0).to(tl.int64) * features, stride)
    block = tl.program_id(0).to(tl.int64)
    while block < blocks:
        begin = run
        while begin < end:
            feature = begin + tl.arange(0, BLOCK_F)
            inside = feature < end
            edges = starts + place_of(block, features + 1) + feature
            start = tl.load(edges, mask=inside, other=0)
            stop = tl.load(edges + 1, mask=inside, other=0)
            here = feature[:, None] * stride + columns[None, :]
            old = tl.load(target + here, mask=inside[:, None], other=0.0)
            total = tl.zeros([BLOCK_F, BLOCK_E, BLOCK_B], tl.float32)
            # kept, not found here: warps that need not meet for it hide each other's waiting
            most = tl.load(longest + place_of(block, tl.cdiv(features, RUN)) + begin // RUN)
            done = 0
            while done < most:
                for turn in tl.static_range(TURNS):
                    entry = start[:, None] + (done + turn * BLOCK_E) + tl.arange(0, BLOCK_E)[None, :]
                    mask = entry < stop[:, None]
                    place = tl.load(order + place_of(block, entries) + entry, mask=mask, other=0).to(tl.int32)
                    if weight is not None:
                        w = decode(tl.load(weight + place_of(block, entries) + place, mask=mask, other=0))
                        first = source + place_of(block * (entries // FAN_IN), stride)
                        row = place_of(place // FAN_IN, stride)
                        rows = tl.load(first + row[:, :, None] + columns[None, None, :], mask=mask[:, :, None], other=0)
                        total += w[:, :, None] * decode(rows)
                    else:
                        first = source + place_of(block * entries * TILES, stride)
                        for tile in tl.static_range(TILES):
                            row = place
                            if TILES > 1:
                                row = (place // FAN_IN * TILES + tile) * FAN_IN + place % FAN_IN
                            row = place_of(row, stride)
                            rows = tl.load(first + row[:, :, None] + columns[None, None, :], mask=mask[:, :, None], other=0)
                            total += decode(rows)
                done += BLOCK_E * TURNS
            tl.store(target + here, old + tl.sum(total, 1), mask=inside[:, None])
            begin += BLOCK_F
        block += slices
