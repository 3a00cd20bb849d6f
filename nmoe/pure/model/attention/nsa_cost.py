"""What native sparse attention costs: pairs that are attended, FLOPs, bytes that are kept."""

from __future__ import annotations

from nmoe.config import sections
from nmoe.pure.model.attention.blocks import SHARE, SHARERS, WORKSPACE, query_blocks
from nmoe.pure.model.attention.gqa import attended, executed

QUERIES = 128
"""Queries whose scores, and whose copies of selected keys, exist at once."""


def num_blocks(length: int, block: int) -> int:
    """Blocks that the first `length` tokens reach into."""
    return -(-length // block)


def num_pooled(length: int, block: int, stride: int) -> int:
    """Compressed blocks that end among the first `length` tokens of a row."""
    return 0 if length < block else (length - block) // stride + 1


def attended_compressed(length: int, block: int, stride: int) -> int:
    """Pairs of query and compressed block of one sequence and head that the mask lets through."""
    whole, rest = divmod(max(0, length - block + 1), stride)
    return stride * whole * (whole + 1) // 2 + rest * (whole + 1)


def attended_selected(length: int, block: int, count: int) -> int:
    """Pairs of query and selected token of one sequence and head that the mask lets through."""
    complete = min(length, count * block)
    whole, rest = divmod(length - complete, block)
    own = (whole * block * (block + 1) + rest * (rest + 1)) // 2
    return complete * (complete + 1) // 2 + (length - complete) * (count - 1) * block + own


def flops(c: sections.Nsa, *, sequence_length: int, causal: bool) -> int:
    """FLOPs of scores and weighted values of the three branches and of making compressed keys, a token of one layer.

    causal  count the attended pairs only; False: those that the reference computes
    """
    block, stride = c.compressed_block, c.compressed_stride
    if causal:
        compressed = attended_compressed(sequence_length, block, stride)
        selected = attended_selected(sequence_length, c.selected_block, c.num_selected)
        pairs = compressed + selected + attended(sequence_length, c.window)
    else:
        pairs = executed(sequence_length, c.window) + sum(
            (end - begin)
            * (
                num_pooled(end, block, stride)
                + min(c.num_selected, num_blocks(end, c.selected_block)) * c.selected_block
            )
            for begin, end in query_blocks(sequence_length, QUERIES)
        )
    attention = 2 * c.num_heads * (c.head_dim + c.v_head_dim) * pairs
    a_block = 2 * c.num_kv_heads * (block + 1) * (c.head_dim**2 + c.v_head_dim**2)
    return (attention + a_block * num_pooled(sequence_length, block, stride)) // sequence_length


def kept_bytes(c: sections.Nsa, *, hidden: int, sequence_length: int, element: int, square: bool) -> int:
    """Bytes a token that autograd keeps of the reference in one layer, its norm apart.

    element  bytes of an activation
    square   whether attention keeps its probabilities; here those of the window
    """
    fp32, index, both = 4, 4, c.head_dim + c.v_head_dim
    blocks = num_pooled(sequence_length, c.compressed_block, c.compressed_stride)
    a_token = (
        hidden  # input of `q`, `k`, `v` and `gate`
        + 3 * c.num_heads * c.head_dim  # queries of each branch
        + 2 * c.num_kv_heads * both
        + 4 * c.num_heads * c.v_head_dim  # results of each branch, input of `out`
        + 3 * c.num_heads  # gates
    ) * element
    selection = c.num_kv_heads * min(c.num_selected, num_blocks(sequence_length, c.selected_block)) * index
    pairs = executed(sequence_length, c.window) if square else 0
    window = c.num_heads * pairs * (fp32 + (element if element < fp32 else 0))
    return a_token + selection + (window + _block_bytes(c, element) * blocks) // sequence_length


def _block_bytes(c: sections.Nsa, element: int) -> int:
    """Bytes that autograd keeps of a compressed block: tokens, both sides of the activation, key, value, rotation."""
    both = c.head_dim + c.v_head_dim
    return c.num_kv_heads * both * (c.compressed_block + 3) * element + c.head_dim * 4


def kernel_kept_bytes(c: sections.Nsa) -> tuple[int, int]:
    """Bytes a token that the kernels keep in one layer, bf16; there are no norms that recompute makes again."""
    heads, groups, values = c.num_heads, c.num_kv_heads, c.v_head_dim
    # queries, rotated keys of two branches, values of three, results of each and of all, gates
    narrow = heads * c.head_dim + groups * (2 * c.head_dim + 3 * values) + 4 * heads * values + 3 * heads
    # log-sums, the lists, and the first token of each compressed block
    numbers = 4 * (3 * heads + groups * c.num_selected) + (_block_bytes(c, 2) + 4) // c.compressed_stride
    return 2 * narrow + numbers, 0


def kernel_passing_bytes(c: sections.Nsa, *, tokens: int, sequence_length: int) -> int:
    """Bytes of one layer's backward pass beside what is kept: gradients, inverted lists, sums in fp32 of keys that
    several programs share, of one branch at a time, and the workspace."""
    groups, a_key = c.num_kv_heads, 4 * (c.head_dim + c.v_head_dim)
    lists = (4 + 4 + 8) * groups * c.num_selected  # owner, sorted owner and place of a query and block
    shared = groups * a_key * max(2 * c.num_selected * c.selected_block // SHARE, 2 * SHARERS // c.compressed_stride)
    return tokens * (2 * c.num_heads * (2 * c.head_dim + 3 * c.v_head_dim) + lists + shared) + WORKSPACE
