"""What the two families of kernels share: their modes, and device functions for positives, losses and the update in place."""

import triton
import triton.language as tl

from fanin.kernels.triton.storage import decode, encode, random_bits

# What a kernel makes of the logits.
STEP = tl.constexpr(0)  # all of a training step but the sum of dx
LOGITS = tl.constexpr(1)  # they are written
SLOPES = tl.constexpr(2)  # dL/dlogits are written: the first half of a step too large for STEP
BACKWARD = tl.constexpr(3)  # dL/dlogits are given: gradients come out, or the update is made
MAXIMA = tl.constexpr(4)  # the highest of each tile is written

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
def is_positive(rows, columns, labels, documents, start, end, first):
    """int1 [rows, columns]: which of those places are among the positives start..end-1; rows count from label `first`."""
    found = (rows < 0) & (columns < 0)
    place = start
    while place < end:
        row = (tl.load(labels + place) - first).to(tl.int32)
        column = tl.load(documents + place).to(tl.int32)
        found = found | ((rows == row) & (columns == column))
        place += 1
    return found


@triton.jit
def slope(z, positive, LOSS: tl.constexpr):
    """dL/dz of logits z where `positive` (int1, like z) says which are positives."""
    if LOSS == BCE:
        return 1.0 / (1.0 + tl.exp(-z)) - positive.to(tl.float32)
    else:
        return tl.where(positive, -2.0 * tl.maximum(1.0 - z, 0.0), 2.0 * tl.maximum(1.0 + z, 0.0))


@triton.jit
def loss_of(z, positive, LOSS: tl.constexpr):
    """The loss of each logit."""
    if LOSS == BCE:
        small = tl.exp(-tl.abs(z))
        one_more = 1.0 + small
        # log1p (Higham, Accuracy and Stability of Numerical Algorithms, 1.14.1): plain log(1 + e) loses e's low digits
        rest = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / tl.maximum(one_more - 1.0, 1e-30)))
        return tl.maximum(z, 0.0) + rest - tl.where(positive, z, 0.0)
    else:
        side = tl.maximum(tl.where(positive, 1.0 - z, 1.0 + z), 0.0)
        return side * side


@triton.jit
def update_weights(
    gradient, weight, momentum, compensation, begin, offset, mask, place, lr, mu, decay, scale, seed, momentum_seed
):  # fmt: skip
    """Update.apply_rounded at begin (int64) + offset (int32, a tile) of weight, momentum and compensation.

    gradient float32, like offset; momentum and compensation may be None; place: the number of the weight at `begin` in the
    whole layer, of which the random bits are made. Returns the stored weights from before.
    """
    weight += begin
    raw = tl.load(weight + offset, mask=mask, other=0)
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
    return raw


@triton.jit
def update_bias(gradient, bias, momentum, offset, mask, lr, mu, scale):
    """The same for biases: float32, without weight decay."""
    change = gradient * scale
    if momentum is not None:
        change += mu * tl.load(momentum + offset, mask=mask, other=0.0)
        tl.store(momentum + offset, change, mask=mask)
    tl.store(bias + offset, tl.load(bias + offset, mask=mask, other=0.0) - lr * change, mask=mask)
