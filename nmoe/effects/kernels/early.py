"""Programmatic dependent launch: a kernel begins while the one before it runs, and reads its weights meanwhile.

A kernel `release`s the next one when all its programs have begun, and `wait`s until the one before it has ended and
what that wrote is seen. Of a chain of kernels launched so, each keeps three rules:

- before `wait` it reads only what no kernel of the chain writes: weights, and what was there before the chain began;
- every program waits, before it reads or writes anything else, and before it ends;
- whatever is no kernel of these (torch, cuBLAS) is launched as ever: it begins when all before it has ended.

So kernel n ends after its own wait, hence after the end of n - 1, and by induction after all before. What n + 1 reads
was written by kernels that have ended; what it overwrites, in memory that an allocator gives a second time, was read by
kernels that have ended, though n + 1 itself, and n + 2 with it, may have begun before n - 1 was through. Nothing is in
flight between two that wait but reads of weights. Compute capability 9.0 and up: all that nmoe has kernels for.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def release(EARLY: tl.constexpr):
    """Let the next kernel begin as soon as every program of this one has come here."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """Go on when the kernels before have ended."""
    if EARLY:
        gdc_wait()


ASKED = tl.constexpr(16384)
"""Bytes of one request to the L2 cache."""


@triton.jit
def fetch(weight, size, EARLY: tl.constexpr):
    """Ask for the first `size` bytes behind a pointer, to lie in the L2 cache for a later kernel.

    Addresses and sizes of a request are multiples of 16: the last bytes of others may be left out.
    """
    if EARLY:
        address = weight.to(tl.int64) // 16 * 16
        size = size // 16 * 16
        for at in range(0, size, ASKED):
            tl.inline_asm_elementwise(
                """
                {
                    .reg .pred first;
                    .reg .b32 thread;
                    mov.u32 thread, %tid.x;
                    setp.eq.u32 first, thread, 0;
                    @first cp.async.bulk.prefetch.L2.global [$1], $2;
                    mov.b32 $0, 0;
                }
                """,
                "=r,l,r",
                [address + at, tl.minimum(ASKED, size - at)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


def launched(x: Tensor) -> dict[str, Any]:
    """Arguments of a launch on the device of `x`; Triton's interpreter runs one kernel after another."""
    return {"EARLY": True, "launch_pdl": True} if x.is_cuda else {"EARLY": False}
