"""How one parameter of ours and the tensors of a Hugging Face folder become each other, as bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from nmoe.errors import InputError

BLOCK = 256
"""Rows of a matrix that are transposed at once: with 2048 columns in bf16, a MB."""


@attrs.frozen(kw_only=True)
class Leaf:
    """One parameter, or one expert of it. Their matrices are [out, in], ours [in, out].

    split  our tensor -> theirs by name, views of it where that is possible
    join   theirs by name -> our tensor; undoes `split`
    views  whether `split` gives views alone, so that theirs can be copied to their places in memory of ours
    """

    split: Callable[[Tensor], dict[str, Tensor]]
    join: Callable[[Mapping[str, Tensor]], Tensor]
    views: bool

    def under(self, prefix: str) -> Leaf:
        """The same with `prefix` before every name of theirs."""
        return Leaf(
            split=lambda ours: {prefix + name: tensor for name, tensor in self.split(ours).items()},
            join=lambda theirs: self.join(
                {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}
            ),
            views=self.views,
        )


def same(name: str) -> Leaf:
    """A tensor of the same shape."""
    return Leaf(split=lambda ours: {name: ours}, join=lambda theirs: theirs[name], views=True)


def matrix(name: str, *, ins: tuple[int, ...] = (-1,), outs: tuple[int, ...] = (-1,)) -> Leaf:
    """A matrix, transposed; of ours, the axes `ins` are one of theirs, and the axes `outs` the other."""
    return Leaf(
        split=lambda ours: {name: ours.flatten(len(ins)).flatten(0, len(ins) - 1).T},
        # Transposed before it is stacked with others, twice as fast as both at once: torch does whole matrices in
        # blocks.
        join=lambda theirs: theirs[name].T.contiguous().unflatten(1, outs).unflatten(0, ins),
        views=True,
    )


def columns(sizes: Mapping[str, int]) -> Leaf:
    """Matrices by name that lie side by side in one of ours, each with so many columns."""
    return Leaf(
        split=lambda ours: {
            name: part.T for name, part in zip(sizes, ours.split(tuple(sizes.values()), dim=1), strict=True)
        },
        join=lambda theirs: torch.cat([theirs[name] for name in sizes]).T,
        views=True,
    )


def beside(leaves: Sequence[Leaf], sizes: Sequence[int], axis: int) -> Leaf:
    """Leaves side by side along an axis, each with so many entries of it."""

    def split(ours: Tensor) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for leaf, part in zip(leaves, ours.split(tuple(sizes), axis), strict=True):
            named |= leaf.split(part)
        return named

    return Leaf(
        split=split,
        join=lambda theirs: torch.cat([leaf.join(theirs) for leaf in leaves], axis),
        views=all(leaf.views for leaf in leaves),
    )


def interleaved(name: str) -> Leaf:
    """Gate and value [... 2 F], of which their tensor [... 2F] has the two of a column in turn."""
    return Leaf(
        split=lambda ours: {name: ours.mT.flatten(-2)},
        join=lambda theirs: theirs[name].unflatten(-1, (-1, 2)).mT.contiguous(),
        views=False,
    )


def along(leaves: Sequence[Leaf], axis: int) -> Leaf:
    """Leaves side by side along an axis of ours that theirs have not."""

    def split(ours: Tensor) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for leaf, part in zip(leaves, ours.unbind(axis), strict=True):
            named |= leaf.split(part)
        return named

    return Leaf(
        split=split,
        join=lambda theirs: torch.stack([leaf.join(theirs) for leaf in leaves], dim=axis),
        views=all(leaf.views for leaf in leaves),
    )


def ordered(leaf: Leaf, order: Sequence[int], axis: int) -> Leaf:
    """A leaf of which they have the entries along an axis of ours in another order: theirs i is our `order[i]`."""
    inverse = sorted(range(len(order)), key=order.__getitem__)

    def taken(tensor: Tensor, places: Sequence[int]) -> Tensor:
        return tensor.index_select(axis, torch.tensor(places, device=tensor.device))

    return Leaf(
        split=lambda ours: leaf.split(taken(ours, order)),
        join=lambda theirs: taken(leaf.join(theirs), inverse),
        views=False,
    )


def shaped(leaf: Leaf, theirs: tuple[int, ...], ours: tuple[int, ...]) -> Leaf:
    """A leaf of which they have another shape, the numbers in the same order."""
    return Leaf(
        split=lambda tensor: {name: each.reshape(theirs) for name, each in leaf.split(tensor).items()},
        join=lambda named: leaf.join({name: each.reshape(ours) for name, each in named.items()}),
        views=leaf.views,
    )


def gated(gate: str, up: str) -> Leaf:
    """The two matrices [in, 2, out] of a gated MLP.

    Joined by blocks that stay in the cache: fresh memory is written once, and torch transposes whole matrices alone
    fast.
    """

    def join(theirs: Mapping[str, Tensor]) -> Tensor:
        blocks = zip(theirs[gate].split(BLOCK), theirs[up].split(BLOCK), strict=True)
        return torch.cat([torch.stack([rows.T.contiguous() for rows in both], 1) for both in blocks], 2)

    return Leaf(split=lambda ours: {gate: ours[:, 0].T, up: ours[:, 1].T}, join=join, views=True)


def zeros(path: str, shape: tuple[int, ...]) -> Leaf:
    """A tensor of ours that theirs have not: zeros. Splitting another is an InputError that names `path`."""

    def split(ours: Tensor) -> dict[str, Tensor]:
        if not ours.is_meta and bool(ours.any()):
            raise InputError(
                f"{path}: expected zeros, because this model type has no such tensor, got others; it cannot be exported"
            )
        return {}

    return Leaf(split=split, join=lambda theirs: torch.zeros(shape), views=False)


def scaled(name: str, factor: float) -> Leaf:
    """A tensor of the same shape, times `factor`; of a model that was imported it is 1.

    Nothing is multiplied on the device "meta", where torch imports itself half for a first product: 1.5 s.
    """
    return Leaf(
        split=lambda ours: {name: ours if ours.is_meta or factor == 1 else ours * factor},
        join=lambda theirs: theirs[name],
        views=factor == 1,
    )


def stacked(name: str, parts: int) -> Leaf:
    """A matrix [parts in, out] of ours whose inputs lie side by side in one of theirs."""
    return Leaf(
        split=lambda ours: {name: ours.flatten(0, 1).T},
        join=lambda theirs: theirs[name].T.unflatten(0, (parts, -1)),
        views=True,
    )


def repeated(leaf: Leaf, *copies: str) -> Leaf:
    """A tensor that they hold under further names too.

    Raises:  InputError when one of those that are joined is another tensor.
    """

    def split(ours: Tensor) -> dict[str, Tensor]:
        ((name, value),) = leaf.split(ours).items()
        return {name: value, **dict.fromkeys(copies, value)}

    def join(theirs: Mapping[str, Tensor]) -> Tensor:
        first, *others = theirs.items()
        for name, value in others:
            if not torch.equal(value, first[1]):
                raise InputError(
                    f"{name}: expected the values of {first[0]}, got others; nmoe shares them with the main model"
                )
        return leaf.join(dict([first]))

    return Leaf(split=split, join=join, views=leaf.views and not copies)
