"""`pure.optim.adamw` on an arena in one launch, and the norm of the gradients in one pass.

Nothing waits for the device: whether to update, the clip, the rate and the number of updates are read from its memory.
Sums are taken block by block and then over the blocks, in an order that does not depend on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.optim.master import load_master, store_master_


@attrs.frozen(kw_only=True)
class ArenaTile:
    """Block size and launch options of a pass over an arena."""

    block: int  # elements at once
    repeats: int  # blocks of a program, one after the other
    num_warps: int
    num_stages: int


TILE = ArenaTile(block=1024, repeats=2, num_warps=4, num_stages=1)
"""AdamW: 97 % of a copy's rate on an H200, docs/log.md, 2026-11-24."""

NORM_TILE = ArenaTile(block=4096, repeats=4, num_warps=4, num_stages=1)
"""Global norm: 96 % in bf16, 102 % in fp32, the same entry."""


@triton.jit
def power(base: tl.constexpr, count):
    """base ** count in fp64, for a whole count of at least 0."""
    result = tl.full((), 1.0, tl.float64)
    square = tl.full((), base, tl.float64)
    while count > 0:
        result = tl.where(count % 2 == 1, result * square, result)
        square = square * square
        count = count // 2
    return result


@triton.jit
def update_kernel(
    value,  # f32, or the bits of bf16 when `has_remainder`
    remainder,  # i16; read and written when `has_remainder`
    first,
    second,
    gradient,  # zero afterwards when `clear`
    partial,  # [programs] f32: sum of squares of the change
    allowed,  # i8
    shrink,
    updates,  # i64
    lr,  # f64
    size,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    decay: tl.constexpr,
    has_remainder: tl.constexpr,
    clear: tl.constexpr,
    block: tl.constexpr,
    repeats: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start = program * (block * repeats)
    changed = tl.zeros((block,), dtype=tl.float32)
    if tl.load(allowed) != 0:
        factor = tl.load(shrink).to(tl.float32)
        count = tl.load(updates)
        rate = tl.load(lr)
        step = (rate / (1.0 - power(beta1, count))).to(tl.float32)
        width = (1.0 / tl.sqrt(1.0 - power(beta2, count))).to(tl.float32)
        kept = (1.0 - rate * decay).to(tl.float32)
        for i in range(0, repeats):
            at = start + i * block + tl.arange(0, block)
            inside = at < size
            g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * factor
            old_first = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
            old_second = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
            old = load_master(value, remainder, at, inside, has_remainder)
            new_first = old_first + (1.0 - beta1) * (g - old_first)
            new_second = old_second * beta2 + (1.0 - beta2) * (g * g)
            root = eps + tl.sqrt_rn(new_second) * width
            new = old * kept - tl.div_rn(new_first * step, root)
            changed += (new - old) * (new - old)
            tl.store(first + at, new_first.to(first.dtype.element_ty), mask=inside)
            tl.store(second + at, new_second.to(second.dtype.element_ty), mask=inside)
            store_master_(value, remainder, at, new, inside, has_remainder)
            # Triton reads an fp32 gradient 8 elements a thread and stores 4, and a constant depends on no load: without
            # the barrier one warp clears what another has not read (docs/log.md, 2026-11-28).
            if clear:
                tl.debug_barrier()
                tl.store(gradient + at, tl.zeros((block,), dtype=gradient.dtype.element_ty), mask=inside)
    elif clear:
        for i in range(0, repeats):
            at = start + i * block + tl.arange(0, block)
            tl.store(gradient + at, tl.zeros((block,), dtype=gradient.dtype.element_ty), mask=at < size)
    tl.store(partial + program, tl.sum(changed, 0))


@triton.jit
def norm_kernel(x, partial, size, block: tl.constexpr, repeats: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    summed = tl.zeros((block,), dtype=tl.float32)
    for i in range(0, repeats):
        at = program * (block * repeats) + i * block + tl.arange(0, block)
        value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        summed += value * value
    tl.store(partial + program, tl.sum(summed, 0))


@torch.no_grad()
def adamw_(
    value: Tensor,
    remainder: Tensor | None,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    *,
    allowed: Tensor,
    shrink: Tensor,
    updates: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    clear: bool = True,
    tile: ArenaTile = TILE,
) -> Tensor:
    """`pure.optim.adamw` on a stretch of an arena, where `allowed`; the norm of the change.

    As the reference rounds it, but for multiplications that are contracted with the addition after them.

    value      f32, or bf16 with its `remainder`; contiguous, as all that follow
    remainder  i16, or None
    first, second, gradient   f32 or bf16
    allowed    0-d bool   false: nothing but `gradient` changes, whatever the gradient holds
    shrink     0-d f32    factor on the gradient, from the clip
    updates    0-d i64    number of updates this one makes it, counted from 1
    lr         0-d f64

    clear      whether `gradient` is to be zero afterwards; false where the next step stores it anew

    Writes:  value, remainder, first, second, gradient.
    Cost:    moves 28 bytes an element for bf16 value and gradient and fp32 moments; 32 with an fp32 gradient. Less 2
             or 4 where nothing is cleared.
    """
    size = value.numel()
    programs = triton.cdiv(size, tile.block * tile.repeats)
    partial = torch.empty(programs, dtype=torch.float32, device=value.device)
    bits = value if remainder is None else value.view(torch.int16)
    update_kernel[(programs,)](
        bits,
        bits if remainder is None else remainder,
        first,
        second,
        gradient,
        partial,
        allowed.view(torch.int8),
        shrink,
        updates,
        lr,
        size,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        decay=decay,
        has_remainder=remainder is not None,
        clear=clear,
        block=tile.block,
        repeats=tile.repeats,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partial.sum().sqrt()


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor], *, tile: ArenaTile = NORM_TILE) -> Tensor:
    """`pure.optim.clip.global_norm`, one launch a tensor; not finite when an element is not.

    gradients  contiguous, f32 or bf16
    returns    0-d f32
    Cost:      reads every element once.
    """
    blocks = [triton.cdiv(gradient.numel(), tile.block * tile.repeats) for gradient in gradients]
    partial = torch.empty(sum(blocks), dtype=torch.float32, device=gradients[0].device)
    for gradient, here, programs in zip(gradients, partial.split(blocks), blocks, strict=True):
        norm_kernel[(programs,)](
            gradient,
            here,
            gradient.numel(),
            block=tile.block,
            repeats=tile.repeats,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return partial.sum().sqrt()
