"""QK-clip: a head whose largest attention score passes a limit has its query and key weights scaled down.

Source:  MuonClip, Kimi K2 (arXiv:2507.20534), section 2.1 and algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.shape import expect_shape
from nmoe.pure.model.norm import upcast

BLOCK = 128
"""Queries whose scores exist together: B·H·128·T numbers."""


@torch.no_grad()
def largest_scores(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float) -> Tensor:
    """The largest score that each head gives a key it sees, before the softmax; arguments as of `mla.attend_mla`.

    returns  [H] in fp32 at least
    Cost:    B·T²·H·C FLOPs beside those of the attention, about a sixth of its forward and backward pass.
    """
    length, nope = q.shape[1], q.shape[-1] - k_rope.shape[-1]
    position = torch.arange(length, device=q.device)
    largest = torch.full_like(upcast(q[0, 0, :, 0]), -torch.inf)
    for begin in range(0, length, BLOCK):
        rows, keys = slice(begin, begin + BLOCK), slice(0, min(begin + BLOCK, length))
        score = torch.einsum("bthn,bshn->bhts", q[:, rows, :, :nope], kv[:, keys, :, :nope])
        score = score + torch.einsum("bthp,bsp->bhts", q[:, rows, :, nope:], k_rope[:, keys])
        visible = (position[keys] <= position[rows, None])[None]
        if isinstance(start, Tensor):
            visible = visible & (position[keys] >= start[:, rows, None])
        score = (upcast(score) * scale).masked_fill(~visible[:, None], -torch.inf)
        largest = torch.maximum(largest, score.amax((0, 2, 3)))
    return largest


def score_bytes(c: Any, num_sequences: int, sequence_length: int, *, element: int) -> int:
    """Bytes that `largest_scores` holds at once: both products and their sum, then two in fp32.

    c        section of the attention
    element  bytes of an activation
    """
    pairs = num_sequences * c.num_heads * min(BLOCK, sequence_length) * sequence_length
    return pairs * (3 * element + 2 * 4)


def factors(c: sections.Mla, largest: Tensor, limit: float) -> dict[str, Tensor]:
    """What the weights of one layer's attention are multiplied with so that no head's scores would have passed.

    A head's own channels of query and key take the root each; the rotated channels of its query take all, because all
    heads share the rotated key.

    largest  [H]   `largest_scores` of the layer
    returns  path in the attention's record -> factor that broadcasts to the parameter; 1 for all other columns
    Raises:  ValueError for another number of heads.
    """
    expect_shape("factors: expected scores", largest.shape, (c.num_heads,), "pass one for each head")
    shrink = (limit / largest.clamp(min=limit))[:, None]
    own, rotated, value = (
        torch.ones(c.num_heads, width, device=largest.device, dtype=largest.dtype)
        for width in (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
    )
    query = torch.cat((own * shrink.sqrt(), rotated * shrink), dim=-1)
    up = {"up": torch.cat((own * shrink.sqrt(), value), dim=-1)[None]}
    if c.q_lora_rank is not None:
        return {"query.up": query[None], **up}
    others = query.new_ones(c.kv_lora_rank + c.qk_rope_head_dim)
    return {"down": torch.cat((query.flatten(), others))[None], **up}
