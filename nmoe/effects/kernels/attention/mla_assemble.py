"""Whole keys for an attention that knows nothing of shared channels, and its gradients taken apart again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 16
"""Heads one program handles at once."""


@triton.jit
def keys_kernel(
    kv, k_rope, k, length, kv_batch, kv_position, kv_head, rope_batch, rope_position, heads,
    NOPE: tl.constexpr, ROPE: tl.constexpr, NOPE_BOX: tl.constexpr, ROPE_BOX: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // length, token % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = (head < heads)[:, None]
    channel = tl.arange(0, NOPE_BOX)
    own = tl.load(
        kv + b * kv_batch + t * kv_position + head[:, None] * kv_head + channel[None, :],
        mask=real & (channel < NOPE)[None, :],
    )
    to = k + (token * heads + head[:, None]) * (NOPE + ROPE)
    tl.store(to + channel[None, :], own, mask=real & (channel < NOPE)[None, :])
    channel = tl.arange(0, ROPE_BOX)
    shared = tl.load(k_rope + b * rope_batch + t * rope_position + channel, mask=channel < ROPE)
    shared = tl.broadcast_to(shared[None, :], (HEADS, ROPE_BOX))
    tl.store(to + NOPE + channel[None, :], shared, mask=real & (channel < ROPE)[None, :])


@triton.jit
def gradients_kernel(
    dk, dv, dkv, dk_rope, length, dk_batch, dk_position, dk_head, dv_batch, dv_position, dv_head, heads,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    NOPE_BOX: tl.constexpr, ROPE_BOX: tl.constexpr, VALUE_BOX: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // length, token % length
    nope, rope, value = tl.arange(0, NOPE_BOX), tl.arange(0, ROPE_BOX), tl.arange(0, VALUE_BOX)
    total = tl.zeros((ROPE_BOX,), tl.float32)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        real = (head < heads)[:, None]
        row = dk + b * dk_batch + t * dk_position + head[:, None] * dk_head
        to = dkv + (token * heads + head[:, None]) * (NOPE + VALUE)
        inside = real & (nope < NOPE)[None, :]
        tl.store(to + nope[None, :], tl.load(row + nope[None, :], mask=inside), mask=inside)
        inside = real & (value < VALUE)[None, :]
        given = dv + b * dv_batch + t * dv_position + head[:, None] * dv_head + value[None, :]
        tl.store(to + NOPE + value[None, :], tl.load(given, mask=inside), mask=inside)
        shared = tl.load(row + NOPE + rope[None, :], mask=real & (rope < ROPE)[None, :], other=0.0)
        total += tl.sum(shared.to(tl.float32), 0)
    tl.store(dk_rope + token * ROPE + rope, total.to(dk_rope.dtype.element_ty), mask=rope < ROPE)


def keys(kv: Tensor, k_rope: Tensor, nope: int) -> Tensor:
    """Each head's whole key: its own channels, then the shared rotated ones.

    kv       [B T H Z]   channels of key first, then of value
    k_rope   [B T P]
    nope     channels of key in `kv`; channels of both lie next to each other
    returns  [B T H C] contiguous
    """
    batch, length, heads, _ = kv.shape
    rope = k_rope.shape[-1]

    k = torch.empty(batch, length, heads, nope + rope, dtype=kv.dtype, device=kv.device)
    keys_kernel[(batch * length, triton.cdiv(heads, HEADS))](
        kv, k_rope, k, length, *kv.stride()[:3], *k_rope.stride()[:2], heads,
        nope, rope, triton.next_power_of_2(nope), triton.next_power_of_2(rope), HEADS, num_warps=4,
    )  # fmt: skip
    return k


def gradients(dk: Tensor, dv: Tensor, rope: int) -> tuple[Tensor, Tensor]:
    """Gradients of `kv` and `k_rope` from those of whole keys and of values.

    dk       [B T H C]
    dv       [B T H U]
    rope     P, the channels that all heads share
    returns  dkv [B T H Z], dk_rope [B T P]: summed over heads in fp32, in their order
    """
    dk, dv = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (dk, dv))
    batch, length, heads, width = dk.shape
    nope, value = width - rope, dv.shape[-1]
    dkv = torch.empty(batch, length, heads, nope + value, dtype=dk.dtype, device=dk.device)
    dk_rope = torch.empty(batch, length, rope, dtype=dk.dtype, device=dk.device)
    gradients_kernel[(batch * length,)](
        dk, dv, dkv, dk_rope, length, *dk.stride()[:3], *dv.stride()[:3], heads, nope, rope, value,
        *(triton.next_power_of_2(size) for size in (nope, rope, value)), HEADS, num_warps=4,
    )  # fmt: skip
    return dkv, dk_rope
