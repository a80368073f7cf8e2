"""Device functions for numbers in memory: decoding, rounding and encoding them, random bits, 64-bit addresses.

float8_e4m3fn comes as uint8 (a view of the same bytes) and is converted in integer arithmetic, which sm_80 can do as well.
In Triton's interpreter, which truncates to bfloat16 and cannot compute with it, bfloat16 comes as int16 in the same way.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def place_of(row, width):
    """row * width in int64, whatever the types: where a row begins. A layer has more weights than an int32 can number.

    Kernels move a pointer to a tile's first row by this and count from there in int32: 64-bit offsets for each element would
    take a tile's registers.
    """
    return row.to(tl.int64) * width


@triton.jit
def decode(raw):
    """Stored numbers in float32."""
    if raw.dtype == tl.int16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif raw.dtype == tl.uint8:
        size = raw.to(tl.int32) & 0x7F
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)  # below 8: subnormals, in units of 2^-9
        value = tl.where(size == 0x7F, float("nan"), value)
        return tl.where(raw >= 0x80, -value, value)
    else:
        return raw.to(tl.float32)


@triton.jit
def operand(raw):
    """Stored weights as a matrix product takes them: float32 as they are, else bfloat16 (which holds every float8)."""
    if raw.dtype == tl.float32:
        return raw
    elif INTERPRETED:
        return decode(raw)
    elif raw.dtype == tl.bfloat16:
        return raw
    else:
        return decode(raw).to(tl.bfloat16)


@triton.jit
def product(a, b, total):
    """total + a @ b, accumulated in float32.

    float32 operands as three tf32 products of their high and low parts: the error stays near float32's own (a single tf32
    product keeps 11 bits), on tensor cores, which "ieee" would leave for plain multiply-adds.
    """
    if INTERPRETED:
        return tl.dot(decode(a), decode(b), total)
    else:
        return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def rounded(value, like):
    """float32 `value` to the nearest number of the type that `like` points to (float32 or bfloat16)."""
    if like.dtype.element_ty == tl.float32:
        return value
    elif INTERPRETED:
        return nearest_bfloat16(value)
    else:
        return value.to(tl.bfloat16)


@triton.jit
def nearest_bfloat16(value):
    """float32 -> the bits (int16) of the nearest bfloat16, ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    # a quiet NaN by hand: the carry could turn its bits into those of another number
    high = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    return high.to(tl.int16)


@triton.jit
def random_bits(begin, offset, seed):
    """32 random bits (uint32) of each place begin + offset: layer.random_bits, which is the finaliser of MurmurHash3.

    begin: an int64 scalar; offset: an int32 tensor, >= 0. The 64-bit sums are made in halves: they need no 64-bit tensor.
    """
    start = begin.to(tl.uint32)
    low = start + offset.to(tl.uint32)
    high = (begin >> 32).to(tl.uint32) + (low < start).to(tl.uint32)
    value = (low * 0x9E3779B1) ^ (high * 0x85EBCA77) ^ seed.to(tl.uint32, bitcast=True)
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def encode(value, bits, like, STOCHASTIC: tl.constexpr):
    """float32 `value` as what `like` points to stores it.

    Below float32 rounded by random `bits` (uint32), or to nearest if not STOCHASTIC: the very bits of layer.store.
    """
    if like.dtype.element_ty == tl.float32:
        return value
    elif like.dtype.element_ty == tl.uint8:
        return _float8(value, bits, STOCHASTIC)
    else:
        if STOCHASTIC:
            high = ((value.to(tl.int32, bitcast=True) + (bits & 0xFFFF).to(tl.int32)) >> 16).to(tl.int16)
        else:
            high = nearest_bfloat16(value)
        return high.to(like.dtype.element_ty, bitcast=True)


@triton.jit
def _float8(value, bits, STOCHASTIC: tl.constexpr):
    raw = value.to(tl.int32, bitcast=True)
    sign = (raw >> 24) & 0x80
    value = tl.minimum(tl.abs(value), 448.0)  # the highest float8_e4m3fn: it has no infinity
    size = value.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        noise = (bits & 0xFFFFF).to(tl.int32)
        normal = ((size + noise) >> 20) - (120 << 3)
        subnormal = (value * 512.0 + noise.to(tl.float32) * 9.5367431640625e-07).to(tl.int32)
    else:
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = (value * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF  # 2^23: the sum rounds to whole units
    code = tl.minimum(tl.where(size < (121 << 23), subnormal, normal), 0x7E)
    return (code | sign).to(tl.uint8)
