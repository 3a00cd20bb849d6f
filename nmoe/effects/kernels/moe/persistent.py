"""A grouped GEMM whose programs take one tile after another: while one is stored, the next one's operands are fetched.

It pays where the summed axis is short, so that storing a tile takes as long as its products (docs/log.md, 2026-11-29).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.effects.kernels.moe import experts
from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.experts import _swizzle
from nmoe.effects.kernels.tables import GemmTile

SHORT = 768
"""Longest summed axis it is used for: on an H200 0.85 of the time with 384, 0.93 with 768; longer ones not measured."""


@triton.jit
def persistent_gemm_kernel(
    rows, w, out, tile_expert, tile_row, num_needed, end, INNER, OUTER,
    TRANSPOSED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(OUTER, N)
    num_m = tl.load(num_needed)
    for pid in tl.range(tl.program_id(0), num_m * columns, PROGRAMS, flatten=True):
        tile, column = _swizzle(pid, columns, num_m, GROUP)
        expert = tl.load(tile_expert + tile)
        first = tl.load(tile_row + tile)
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, INNER, K):
            if TRANSPOSED:
                acc = tl.dot(rows.load([first, k]), w.load([expert * OUTER + column * N, k]).T, acc)
            else:
                acc = tl.dot(rows.load([first, k]), w.load([expert * INNER + k, column * N]), acc)
        row = first + tl.arange(0, M)
        n = column * N + tl.arange(0, N)
        inside = (row < tl.load(end + expert))[:, None] & (n < OUTER)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * OUTER + n[None, :], acc.to(rows.dtype), mask=inside)


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    end: Tensor,
    tiles: RowTiles,
    tile: GemmTile,
    group: int,
    programs: int,
    *,
    transposed: bool,
) -> Tensor:
    """`experts.grouped_gemm`: the same bits, by the kernel that is faster for this length of the summed axis.

    programs  that share the tiles out: one a multiprocessor
    """
    inner = rows.shape[1]
    if inner > SHORT:
        return experts.grouped_gemm(rows, weight, end, tiles, tile, group, transposed=transposed)
    outer = weight.shape[1] if transposed else weight.shape[2]
    out = torch.empty(rows.shape[0], outer, dtype=rows.dtype, device=rows.device)
    block = [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]
    programs = min(programs, tiles.expert.shape[0] * triton.cdiv(outer, tile.block_n))
    persistent_gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight.view(-1, weight.shape[2]), block),
        out, tiles.expert, tiles.row, tiles.needed, end, inner, outer, transposed,
        tile.block_m, tile.block_n, tile.block_k, group, programs,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
