"""Kernels that call the backend's device functions on their own, so that each can be tested for itself."""

import triton
import triton.language as tl

from fanin.kernels.triton.storage import decode, encode, place_of, random_bits


@triton.jit
def decoded(stored, out, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + place, decode(tl.load(stored + place)))


@triton.jit(do_not_specialize=["seed"])
def encoded(values, stored, first, seed, STOCHASTIC: tl.constexpr, SIZE: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    bits = random_bits(tl.load(first), offset, seed)
    tl.store(stored + offset, encode(tl.load(values + offset), bits, stored, STOCHASTIC))


@triton.jit
def begins(rows, width, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, place_of(tl.load(rows + place), width))
