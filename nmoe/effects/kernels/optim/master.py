"""`pure.formats.master` in kernels: fp32 values that are stored as they are, or as bf16 with their low halves."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_master(value, remainder, at, inside, has_remainder: tl.constexpr):
    """Values in fp32.

    value      f32, or the bits of bf16 as i16 when `has_remainder`
    remainder  i16; read when `has_remainder`
    """
    if has_remainder:
        high = tl.load(value + at, mask=inside, other=0).to(tl.int32) << 16
        low = tl.load(remainder + at, mask=inside, other=0).to(tl.int32)
        return (high + low).to(tl.float32, bitcast=True)
    else:
        return tl.load(value + at, mask=inside, other=0.0)


@triton.jit
def store_master_(value, remainder, at, new, inside, has_remainder: tl.constexpr):
    """Writes:  value and remainder, as `load_master` reads them."""
    if has_remainder:
        # a NaN's payload of all ones would round to -0
        bits = tl.where(new != new, 0x7FC00000, new.to(tl.int32, bitcast=True))
        rounded = (bits + 0x8000) >> 16
        tl.store(value + at, rounded.to(tl.int16), mask=inside)
        tl.store(remainder + at, (bits - (rounded << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(value + at, new, mask=inside)
