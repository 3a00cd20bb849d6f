"""What flash attention of every kind shares: the order of programs, blocks of positions, and what a query sees.

Channels are read through descriptors [B H T channels], which fill with zeros what a block has beyond a sequence's or a
head's end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Score of a masked pair: finite, as (-inf) - (-inf) of a row whose first blocks are all masked would be NaN.
HIDDEN = tl.constexpr(-1e30)
# exp2 and log2 are single instructions, exp and log are not: softmax is computed to base 2.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def schedule(blocks, rows, heads_per_group: tl.constexpr):
    """Program order: block and (sequence, head) of this program.

    First blocks of `heads_per_group` heads, then their second blocks, and so on: their keys stay in the L2 cache, and
    the longest programs start first, so that none is left alone at the end. dQ with four heads a group: 1.98 ms on an
    H200, docs/log.md, 2026-11-24.
    """
    per_group = blocks * heads_per_group
    group = tl.program_id(0) // per_group
    within = tl.program_id(0) % per_group
    width = tl.minimum(rows - group * heads_per_group, heads_per_group)
    return within // width, group * heads_per_group + within % width


@triton.jit
def load_block(x, b, h, t, size: tl.constexpr, channels: tl.constexpr):
    return tl.reshape(x.load([b, h, t, 0]), (size, channels))


@triton.jit
def store_block_(x, b, h, t, value, size: tl.constexpr, channels: tl.constexpr):
    x.store([b, h, t, 0], tl.reshape(value.to(x.dtype), (1, 1, size, channels)))


@triton.jit
def visible(queries, keys, first_key, documents: tl.constexpr):
    """Where a query sees a key; the three broadcast."""
    visible = queries >= keys
    if documents:
        visible = visible & (first_key <= keys)
    return visible


def ends(start: Tensor) -> Tensor:
    """One past the last query that sees each key, [B T] i32: how many starts are not after it."""
    keys = torch.arange(start.shape[1], dtype=start.dtype, device=start.device)
    return torch.searchsorted(start, keys.expand_as(start).contiguous(), right=True, out_int32=True)


def readable(x: Tensor) -> Tensor:
    """`x` where a descriptor can read it: channels side by side, all else in steps of 16 bytes; or a copy that is."""
    width = x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step * width % 16 == 0 for step in x.stride()[:-1])
    return x if fits else x.contiguous()


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of `rows` positions of one head of x [B T H channels], all its channels rounded up to a power of two."""
    batch, positions, heads, channels = x.shape
    by_batch, by_position, by_head, by_channel = x.stride()
    shape, strides = [batch, heads, positions, channels], [by_batch, by_head, by_position, by_channel]
    return TensorDescriptor(x, shape, strides, [1, 1, rows, box(channels)])


def box(channels: int) -> int:
    """Channels of a block: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(channels))
