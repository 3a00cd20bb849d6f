"""Newton-Schulz iterations on many matrices at once, in their Gram matrices.

X' = Q X with Q = a I + b G + c G G and G = X X^T: all polynomials of G are symmetric and commute, so that of a product
of two only the tiles on and under the diagonal are computed, and the others mirrored. G' = Q G Q needs no X, and of
several iterations Q'' Q' Q X is one product with X; `SEGMENTS` says after which a Gram matrix is made anew.

Letters: B matrices, M rows, N columns, S the smaller side; in a kernel M, N, K are the block sizes of `GemmTile`. A
tall matrix is worked on from the right, X' = X Q, so that nothing is transposed in memory.

Descriptors have three axes and end where a matrix ends: what lies beyond is read as zero, so that every size is right.
A tile is summed by one program in one order, and does not depend on how many matrices there are: the same bits always.
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.effects.kernels.tables import GemmTile
from nmoe.pure.optim.muon import COEFFICIENTS

SEGMENTS = (2, 1, 2)
"""Iterations on one Gram matrix, the first time two at least. G has small negative eigenvalues by rounding, which an
iteration multiplies by up to a a; and the powers of a in Q'' Q' Q cancel where X is large. In bf16 the error is that of
iterations on X; with (3, 2) a twentieth of the FLOPs less, up to five times that error (docs/log.md, 2026-11-29)."""


@attrs.frozen(kw_only=True)
class Products:
    """How the products are cut up: symmetric ones into squares, of the applied one `block_n` cuts the larger side."""

    gram: GemmTile  # X X^T
    square: GemmTile  # of two symmetric matrices
    apply: GemmTile  # Q X


# At the power's limit cuBLAS takes 812 us for Q X of 64 matrices of 1408 x 2048, these tiles 817, programs that stay 826,
# 128 x 256 by 8 warps 884; X X^T takes 474, by 8 warps 487 (docs/log.md, 2026-11-29).
PRODUCTS = Products(
    gram=GemmTile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3),
    square=GemmTile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3),
    apply=GemmTile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3),
)


@triton.jit
def _block(x, matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of one matrix; zeros beyond its end."""
    return tl.reshape(x.load([matrix, row, column]), (ROWS, COLUMNS))


@triton.jit
def symmetric_kernel(
    left,  # descriptor [B M N]
    right,  # descriptor [B M N]: the tensor of `left`, or a symmetric matrix that commutes with it
    added,  # descriptor [B S S], or None: the tensor of `left`, a whole tile at a time
    scale,  # [B] f32, or None
    out,  # descriptor [B S S], a whole tile at a time
    side,
    inner,
    PRODUCT: tl.constexpr,
    ADDED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TALL: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    num = tl.cdiv(side, M)
    tiles = num * (num + 1) // 2
    matrix = tl.program_id(0) // tiles
    # tile t on or under the diagonal, counted row by row; the root is right to one
    t = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    j = t - i * (i + 1) // 2
    # without it ptxas has each product wait for the one before, on sm_90: the path around the loop merges accumulators
    tl.assume(inner > 0)
    acc = tl.zeros((M, M), tl.float32)
    for k in range(0, inner, K):
        if TALL:
            rows = _block(left, matrix, k, i * M, K, M).T
            acc = tl.dot(rows, _block(right, matrix, k, j * M, K, M), acc, input_precision="ieee")
        else:
            columns = _block(right, matrix, j * M, k, M, K).T
            acc = tl.dot(_block(left, matrix, i * M, k, M, K), columns, acc, input_precision="ieee")
    factor = tl.full((), PRODUCT, tl.float32)
    if scale is not None:
        factor *= tl.load(scale + matrix)
    acc *= factor
    if added is not None:
        acc += ADDED * _block(added, matrix, i * M, j * M, M, M).to(tl.float32)
    if DIAGONAL != 0.0:
        on = (i * M + tl.arange(0, M))[:, None] == (j * M + tl.arange(0, M))[None, :]
        acc += tl.where(on, DIAGONAL, 0.0)
    result = acc.to(out.dtype)
    out.store([matrix, i * M, j * M], tl.reshape(result, (1, M, M)))
    if i != j:
        out.store([matrix, j * M, i * M], tl.reshape(result.T, (1, M, M)))


@triton.jit
def apply_kernel(
    left,  # descriptor [B M S]
    right,  # descriptor [B S N]
    out,  # descriptor [B M N]
    rows,
    columns,
    inner,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    across = tl.cdiv(columns, N)
    tiles = tl.cdiv(rows, M) * across
    matrix = tl.program_id(0) // tiles
    m = tl.program_id(0) % tiles // across * M
    n = tl.program_id(0) % across * N
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, inner, K):
        other = _block(right, matrix, k, n, K, N)
        acc = tl.dot(_block(left, matrix, m, k, M, K), other, acc, input_precision="ieee")
    out.store([matrix, m, n], tl.reshape(acc.to(out.dtype), (1, M, N)))


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, columns])


def padded(count: int, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for matrices [B M N] whose rows begin at multiples of 16 bytes, as descriptors need."""
    unit = 16 // dtype.itemsize
    flat = torch.empty(count, rows, -(-columns // unit) * unit, dtype=dtype, device=like.device)
    return flat[:, :, :columns]


def symmetric_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    tile: GemmTile,
    *,
    product: float = 1.0,
    added: float = 0.0,
    diagonal: float = 0.0,
    scale: Tensor | None = None,
    tall: bool = False,
) -> None:
    """`product` `scale` L R^T + `added` L + `diagonal` I, or of L^T R where `tall`, whose result is symmetric.

    out    [B S S], rows at multiples of 16 bytes, as `padded` makes them; in memory of its own
    left   [B M N]; symmetric where it is added
    right  [B M N]: `left`, or symmetric matrices that commute with it
    scale  [B] f32

    Writes:  out; what is above the diagonal's tiles is the mirror of what is under them.
    Cost:    half the multiplications of the product, and half a tile's more for each on the diagonal.
    """
    count, rows, columns = left.shape
    side, inner = (columns, rows) if tall else (rows, columns)
    num = triton.cdiv(side, tile.block_m)
    box = (tile.block_k, tile.block_m) if tall else (tile.block_m, tile.block_k)
    whole = (tile.block_m, tile.block_m)
    symmetric_kernel[(count * (num * (num + 1) // 2),)](
        _described(left, *box), _described(right, *box), _described(left, *whole) if added else None, scale,
        _described(out, *whole), side, inner, product, added, diagonal, tall, tile.block_m, tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def apply_(out: Tensor, q: Tensor, x: Tensor, tile: GemmTile) -> None:
    """Q X, or X Q of tall matrices.

    out  [B M N], rows at multiples of 16 bytes, as those of the others; in memory of its own
    q    [B S S]
    x    [B M N]

    Writes:  out.
    """
    count, rows, columns = x.shape
    tall, k = rows > columns, tile.block_k
    (left, right), m, n = ((x, q), tile.block_n, tile.block_m) if tall else ((q, x), tile.block_m, tile.block_n)
    apply_kernel[(count * triton.cdiv(rows, m) * triton.cdiv(columns, n),)](
        _described(left, m, k), _described(right, k, n), _described(out, m, n), rows, columns, q.shape[1], m, n, k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def orthogonalize(x: Tensor, scale: Tensor, products: Products = PRODUCTS) -> Tensor:
    """`pure.optim.muon.orthogonalize` of matrices that are not yet divided by their norms.

    x        [B M N] as `padded` makes them; it is used up
    scale    [B] f32, one over the norm of each
    returns  [B M N] in the format of `x`, in its memory or in another as large

    Writes:  x.
    Cost:    S S (11 S + 9 L) FLOPs a matrix with L = max(M, N), where tiles are small beside S; whole products on X are
             S S (10 S + 20 L).
    """
    a, b, c = COEFFICIENTS
    count, rows, columns = x.shape
    tall, side = rows > columns, min(rows, columns)
    gram, q, power, spare = (padded(count, side, side, x, x.dtype) for _ in range(4))
    other = padded(count, rows, columns, x, x.dtype)
    squared, own = scale.square(), scale
    for length in SEGMENTS:
        symmetric_(gram, x, x, products.gram, tall=tall, scale=squared)
        for step in range(length):
            first, last = step == 0, step == length - 1
            now = power if first else q
            symmetric_(now, gram, gram, products.square, product=c, added=b, diagonal=a)
            if not last:
                symmetric_(spare, now, gram, products.square)
                symmetric_(gram, spare, now, products.square)
            if not first:
                symmetric_(spare, q, power, products.square, scale=own if last else None)
                power, spare = spare, power
        apply_(other, power, x, products.apply)
        x, other, squared, own = other, x, None, None
    return x
