"""Tensors copied from one place in memory to another, transposed where they lie so."""

from __future__ import annotations

from torch import Tensor

BLOCK = 256
"""Rows or columns that are made a whole matrix at once: with 2048 of the others in bf16, a MB, which stays in the
cache."""


def copy_(out: Tensor, tensor: Tensor) -> None:
    """Write a tensor to a place of its shape, rounded to its format; either may be a transposed matrix.

    Writes:  out.
    """
    if out.ndim == 2 and tensor.stride(0) == 1 and tensor.stride(1) != 1:
        transpose_(out, tensor.T)
    elif out.ndim == 2 and out.stride(0) == 1 and out.stride(1) != 1:
        transpose_(out.T, tensor)
    else:
        out.copy_(tensor)


def transpose_(out: Tensor, matrix: Tensor) -> None:
    """Write a matrix [R C] transposed to `out` [C R], rounded to its format.

    torch transposes whole matrices in blocks, and columns of wider ones an element at a time, four times slower: they
    become whole matrices first, some of them at a time.

    Writes:  out.
    """
    matrix = matrix.to(out.dtype)
    if out.is_contiguous() and matrix.is_contiguous():
        out.copy_(matrix.T)
    elif out.is_contiguous():
        for rows, columns in zip(out.split(BLOCK), matrix.split(BLOCK, 1), strict=True):
            rows.copy_(columns.contiguous().T)
    else:
        for columns, rows in zip(out.split(BLOCK, 1), matrix.split(BLOCK), strict=True):
            columns.copy_(rows.contiguous().T.contiguous())
