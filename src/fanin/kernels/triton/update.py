"""What the two families of kernels share: their modes, and device functions for positives, losses and the update in place."""

import torch
import triton
import triton.language as tl

from fanin.kernels.triton.storage import decode, encode, random_bits

# What a kernel makes of the logits.
STEP = tl.constexpr(0)  # all of a training step but the sum of dx
LOGITS = tl.constexpr(1)  # they are written
SLOPES = tl.constexpr(2)  # dL/dlogits are written: the first half of a step too large for STEP
BACKWARD = tl.constexpr(3)  # dL/dlogits are given: gradients come out, or the update is made
MAXIMA = tl.constexpr(4)  # the highest of each tile is written

NVIDIA = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)

BCE = tl.constexpr(0)
SQUARED_HINGE = tl.constexpr(1)


@triton.jit
def end_of_run(labels, start, end, label):
    """The first place from `start` on whose label is not `label`, in the sorted list labels[start:end]."""
    place = start
    while tl.load(labels + place, mask=place < end, other=-1) == label:
        place += 1
    return place


@triton.jit
def at_positives(value, z, rows, columns, labels, documents, start, end, first, LOSS: tl.constexpr, SLOPE: tl.constexpr):
    """`value`, slopes (SLOPE) or losses of logits z as if all were negative, put right at the positives start..end-1.

    rows count from label `first`. Nearly all tiles have none, so that a mask of all of it would cost more than this loop.
    """
    place = start
    while place < end:
        row = (tl.load(labels + place) - first).to(tl.int32)
        column = tl.load(documents + place).to(tl.int32)
        here = (rows == row) & (columns == column)
        if SLOPE:
            value = tl.where(here, value - 1.0 if LOSS == BCE else -2.0 * tl.maximum(1.0 - z, 0.0), value)
        else:
            side = tl.maximum(1.0 - z, 0.0)
            value = tl.where(here, value - z if LOSS == BCE else side * side, value)
        place += 1
    return value


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z) by the GPU's approximate exponential and reciprocal: four instructions, within 4e-7 of it.

    Where e^-z is beyond float32 that is 0. Plain `exp` and `/` take four times as many, for subnormal numbers, of which
    there are none here that matter.
    """
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, e; }",
            "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def slope(z, LOSS: tl.constexpr):
    """dL/dz of logits z that are negatives."""
    if LOSS == BCE:
        return sigmoid(z)
    else:
        return 2.0 * tl.maximum(1.0 + z, 0.0)


@triton.jit
def loss_of(z, LOSS: tl.constexpr):
    """The loss of each logit that is a negative."""
    if LOSS == BCE:
        small = tl.exp(-tl.abs(z))
        one_more = 1.0 + small
        # log1p (Higham, Accuracy and Stability of Numerical Algorithms, 1.14.1): plain log(1 + e) loses e's low digits
        rest = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / tl.maximum(one_more - 1.0, 1e-30)))
        return tl.maximum(z, 0.0) + rest
    else:
        side = tl.maximum(1.0 + z, 0.0)
        return side * side


@triton.jit
def update_weights(
    gradient, raw, weight, momentum, compensation, begin, offset, mask, place, lr, mu, decay, scale, seed, momentum_seed
):  # fmt: skip
    """Update.apply_rounded at begin (int64) + offset (int32, a tile) of weight, momentum and compensation.

    gradient float32, and raw, the stored weights, like offset; momentum and compensation may be None; place: the number of
    the weight at `begin` in the whole layer, of which the random bits are made.
    """
    weight += begin
    old = decode(raw)
    change = gradient * scale + decay * old
    if momentum is not None:
        momentum += begin
        change += mu * decode(tl.load(momentum + offset, mask=mask, other=0))
        bits = random_bits(place, offset, momentum_seed)
        tl.store(momentum + offset, encode(change, bits, momentum, True), mask=mask)
    if compensation is not None:
        compensation += begin
        step = decode(tl.load(compensation + offset, mask=mask, other=0)) - lr * change
        stored = encode(old + step, offset, weight, False)
        tl.store(weight + offset, stored, mask=mask)
        tl.store(compensation + offset, encode(step - (decode(stored) - old), offset, compensation, False), mask=mask)
    else:
        stored = encode(old - lr * change, random_bits(place, offset, seed), weight, True)
        tl.store(weight + offset, stored, mask=mask)


@triton.jit
def update_bias(gradient, bias, momentum, offset, mask, lr, mu, scale):
    """The same for biases: float32, without weight decay."""
    change = gradient * scale
    if momentum is not None:
        change += mu * tl.load(momentum + offset, mask=mask, other=0.0)
        tl.store(momentum + offset, change, mask=mask)
    tl.store(bias + offset, tl.load(bias + offset, mask=mask, other=0.0) - lr * change, mask=mask)
