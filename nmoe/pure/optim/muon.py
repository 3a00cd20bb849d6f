"""Muon, out of place: the momentum of each matrix, orthogonalised, is its update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_shape
from nmoe.pure.core.spec import POLICY, Dims, Role, Spec, axis_size

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon: an optimizer for hidden layers"): steep at 0, and
singular values end between 0.7 and 1.2, not at 1."""

ITERATIONS = 5

SMALLEST_NORM = 1e-7
"""A matrix of a smaller norm is divided by this: zeros stay zeros."""

RMS = 0.2
"""Root mean square that an update of AdamW usually has (arXiv:2502.16982, section 2.2)."""


ELEMENTS = 3 << 26
"""Elements of the matrices that kernels orthogonalise at once: their temporaries are at most 2.4 GB in bf16, and the
tiles of 64 experts of 2048 x 1408 fill the multiprocessors of an H200 exactly 32 times."""

Cut = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""(apply, tensor) -> tensor: `by_matrix` of a parameter, or `by_parameter` of several."""


def temporary_bytes(size: int, *, bf16: bool) -> int:
    """Bytes that the update of a parameter of so many elements makes at most at once, by the functions below.

    Seven numbers in fp32 an element: gradient, momentum, what is ahead, and of the product four; of a parameter in bf16
    the joined value too.
    """
    return size * (32 if bf16 else 28)


@attrs.frozen(kw_only=True)
class Matrices:
    """Matrices of one size that lie in a flat tensor, counted by up to two axes; numbers are elements."""

    offset: int  # of the first one
    counts: tuple[int, int]
    steps: tuple[int, int]  # from one matrix to the next along each axis
    rows: int
    columns: int
    row_step: int
    column_step: int

    def number(self) -> int:
        """How many there are."""
        return self.counts[0] * self.counts[1]


Turn = tuple[tuple[Matrices, int, int], ...]
"""What is orthogonalised at once: of each the first matrix and their number."""


def turns(parts: Sequence[Matrices], elements: int = ELEMENTS) -> Iterator[Turn]:
    """Matrices of one size together, in equal turns of at most so many elements, or of one matrix."""
    for rows, columns in dict.fromkeys((part.rows, part.columns) for part in parts):
        same = [part for part in parts if (part.rows, part.columns) == (rows, columns)]
        number = sum(part.number() for part in same)
        size = -(-number // -(-number // max(1, elements // (rows * columns))))
        for first in range(0, number, size):
            yield tuple(_between(same, first, first + size))


def _between(parts: Sequence[Matrices], first: int, last: int) -> Iterator[tuple[Matrices, int, int]]:
    """Those before `last` from `first` on, as if all were counted in one row."""
    begin = 0
    for part in parts:
        low, high = max(first - begin, 0), min(last - begin, part.number())
        if low < high:
            yield part, low, high - low
        begin += part.number()


def kernel_bytes(parts: Sequence[Matrices], element: int) -> int:
    """Temporaries of kernels in the largest turn: its matrices twice, and four symmetric ones of each.

    element  bytes of a number in the products, whose rows begin at multiples of 16
    """
    unit, most = 16 // element, 0
    for turn in turns(parts):
        rows, columns = turn[0][0].rows, turn[0][0].columns
        side = min(rows, columns)
        pieces = 2 * rows * -(-columns // unit) + 4 * side * -(-side // unit)
        most = max(most, sum(count for _, _, count in turn) * pieces * 16)
    return most


def matrices(cut: Cut, size: int) -> tuple[Matrices, ...]:
    """Where the matrices of parameters lie in their elements.

    cut   takes them apart
    size  elements of the parameters, and of what lies between them
    """
    found: list[Tensor] = []

    def noted(part: Tensor) -> Tensor:
        found.append(part)
        return part

    cut(noted, torch.empty(size, device="meta"))
    return tuple(each for part in found for each in _described(int(part.storage_offset()), part.shape, part.stride()))


def _described(offset: int, shape: Sequence[int], strides: Sequence[int]) -> Iterator[Matrices]:
    """A view [... M N] as matrices of up to two counted axes."""
    counted = [axis for axis in zip(shape[:-2], strides[:-2], strict=True) if axis[0] > 1]
    if len(counted) > 2:
        (count, step), *rest = counted
        shape, strides = ([*(axis[at] for axis in rest), *last[-2:]] for at, last in enumerate((shape, strides)))
        for index in range(count):
            yield from _described(offset + index * step, shape, strides)
        return
    outer, inner = [(1, 0)] * (2 - len(counted)) + counted
    yield Matrices(
        offset=offset,
        counts=(outer[0], inner[0]),
        steps=(outer[1], inner[1]),
        rows=shape[-2],
        columns=shape[-1],
        row_step=strides[-2],
        column_step=strides[-1],
    )


def by_parameter(
    apply: Callable[[Tensor], Tensor], tensor: Tensor, *, parameters: Sequence[tuple[int, int, Cut]]
) -> Tensor:
    """`apply` to the matrices of parameters that lie in a flat tensor, and its results in their places.

    parameters  begin, size and `by_matrix` of each, in their order
    returns     [numel] zeros where no parameter lies
    """
    pieces, end = [], 0
    for begin, size, cut in parameters:
        pieces += [tensor.new_zeros(begin - end), cut(apply, tensor[begin : begin + size])]
        end = begin + size
    return torch.cat([*pieces, tensor.new_zeros(tensor.numel() - end)])


def by_matrix(
    apply: Callable[[Tensor], Tensor],
    tensor: Tensor,
    *,
    spec: Spec,
    shape: tuple[int, ...],
    dims: Dims,
    heads_apart: bool = False,
) -> Tensor:
    """`apply` to the matrices that a parameter consists of, and its results in their places.

    The sharded axis and axes that are numbers count matrices: experts, gate and value. The two others are the sides;
    several axes are one side together where the spec merges them, and a side that begins with `A+B` is two matrices
    side by side.

    apply        [... M N] -> [... M N], called once for each part of a sum
    tensor       of as many elements as `shape`
    shape        of the parameter on this rank
    heads_apart  the first of merged axes, and of `H*C` the first, count matrices too; only for Role.MATRIX, of others
                 they are no heads
    returns      of the shape of `tensor`
    Raises:      ValueError when there are not two sides.
    """
    counted = [at for at, axis in enumerate(spec.axes) if axis.isdigit() or axis == POLICY[spec.role].shard]
    merged, apart = spec.merged, heads_apart and spec.role is Role.MATRIX
    if apart and merged:
        counted.append(spec.axes.index(merged[0]))
        merged = merged[1:]
    rest = [at for at in range(len(spec.axes)) if at not in counted]
    sides = [spec.axes[at] for at in rest]
    moved = tensor.view(shape).permute(*counted, *rest)
    value, inner = moved, dict.fromkeys(sides, 1)  # inner: elements of a side that one index of its first axis has
    if len(merged) > 1:
        first, count = sides.index(merged[0]), len(merged)
        place = len(counted) + first
        joined = math.prod(moved.shape[place : place + count])
        value = moved.view(*moved.shape[:place], joined, *moved.shape[place + count :])
        del sides[first + 1 : first + count]
        inner[sides[first]] = math.prod(shape[at] for at in rest[first + 1 : first + count])
    if len(sides) != 2:
        raise ValueError(
            f"Muon: expected a matrix, got axes {' '.join(spec.axes)}; put the axes that are one side of it into "
            "parentheses where the parameter is declared, or train its group by AdamW"
        )
    for dim, side in zip((-2, -1), sides, strict=True):
        if "+" in side:
            parts = side.split("+")
            sizes = [axis_size(part, dims) * inner[side] for part in parts]
            heads = [axis_size(part.split("*")[0], dims) if apart and "*" in part else 1 for part in parts]
            apply = partial(_side_by_side, apply, dim, sizes, heads)
    order = sorted(range(len(spec.axes)), key=[*counted, *rest].__getitem__)
    return apply(value).reshape(moved.shape).permute(order).reshape(tensor.shape)


def _side_by_side(
    apply: Callable[[Tensor], Tensor], dim: int, sizes: list[int], heads: list[int], value: Tensor
) -> Tensor:
    """`apply` to each of the matrices that lie side by side along `dim`; a part of several heads is one of each."""
    parts: list[Tensor] = []
    for part, count in zip(value.split(sizes, dim), heads, strict=True):
        if count > 1:
            each = part.unflatten(dim, (count, -1)).movedim(dim - 1, 0)
            parts.append(apply(each).movedim(0, dim - 1).flatten(dim - 1, dim))
        else:
            parts.append(apply(part))
    return torch.cat(parts, dim)


def orthogonalize(x: Tensor, *, bf16: bool) -> Tensor:
    """Nearly the orthogonal factor of each matrix's polar decomposition, by Newton-Schulz iterations.

    x        [... M N]
    bf16     whether the products are in bf16, which is enough; else in the format of `x`
    returns  [... M N] in the format of the products; singular values between about 0.7 and 1.2, zeros of zeros
    Source:  Jordan et al. 2024, as `torch.optim.Muon` has it; in the smaller of the two Gram matrices.
    """
    a, b, c = COEFFICIENTS
    flat = x.shape[-2] <= x.shape[-1]
    y = (x if flat else x.mT).reshape(-1, *sorted(x.shape[-2:]))
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    if bf16:
        y = y.to(torch.bfloat16)
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y if flat else y.mT).reshape(x.shape)


def direction(x: Tensor, *, bf16: bool) -> Tensor:
    """`orthogonalize`, scaled to the root mean square of an update of AdamW, in the format of `x`."""
    return orthogonalize(x, bf16=bf16).to(x.dtype) * (RMS * math.sqrt(max(x.shape[-2:])))


def muon(
    value: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor],
    *,
    updates: Tensor,
    lr: Tensor,
    momentum: float,
    decay: float,
    by_matrix: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    bf16: bool,
) -> tuple[Tensor, tuple[Tensor]]:
    """One step of Muon with Nesterov momentum and decoupled weight decay.

    The update of a matrix is scaled by 0.2 sqrt(max(M, N)), so that learning rates and decay of AdamW serve it as well.

    value     f32   the exact parameter, whole
    gradient  f32   already clipped
    moments   the momentum, in any format
    updates   not needed
    lr        0-d f64
    by_matrix (apply, tensor) -> tensor, as the function above for this parameter
    bf16      whether the Newton-Schulz products are in bf16
    returns   the new value and momentum, f32
    Raises:   ValueError for a gradient or momentum of another shape than the parameter.
    Source:   Liu et al. (arXiv:2502.16982) section 2.2, as `torch.optim.Muon` with "match_rms_adamw".
    """
    for name, tensor in zip(("a gradient", "a momentum"), (gradient, *moments), strict=True):
        expect_shape(f"muon: expected {name}", tensor.shape, value.shape, "pass one of this parameter")
    buffer = torch.lerp(moments[0].to(value.dtype), gradient, 1 - momentum)
    ahead = torch.lerp(gradient, buffer, momentum)
    step = by_matrix(partial(direction, bf16=bf16), ahead)
    kept = value * (1 - lr * decay) if decay else value
    return kept - lr.to(value.dtype) * step, (buffer,)
