"""How one parameter of ours and the tensors of a Hugging Face folder become each other, as bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from nmoe.errors import InputError
from nmoe.pure.core.transpose import transpose_


@attrs.frozen(kw_only=True)
class Leaf:
    """One parameter, or one expert of it. Their matrices are [out, in], ours [in, out].

    split  our tensor -> theirs by name, views of it where that is possible
    join_  writes theirs, by name, into our tensor, of which it may be a part, and in its format; undoes `split`
    """

    split: Callable[[Tensor], dict[str, Tensor]]
    join_: Callable[[Tensor, Mapping[str, Tensor]], object]

    def under(self, prefix: str) -> Leaf:
        """The same with `prefix` before every name of theirs."""
        return Leaf(
            split=lambda ours: {prefix + name: tensor for name, tensor in self.split(ours).items()},
            join_=lambda ours, theirs: self.join_(
                ours, {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}
            ),
        )


def same(name: str) -> Leaf:
    """A tensor of the same shape."""
    return Leaf(split=lambda ours: {name: ours}, join_=lambda ours, theirs: ours.copy_(theirs[name]))


def matrix(name: str, *, ins: int = 1) -> Leaf:
    """A matrix, transposed; of ours, the first `ins` axes are one of theirs, and the others the other."""

    def join_(ours: Tensor, theirs: Mapping[str, Tensor]) -> None:
        transpose_(ours.view(math.prod(ours.shape[:ins]), -1), theirs[name])

    return Leaf(split=lambda ours: {name: ours.flatten(ins).flatten(0, ins - 1).T}, join_=join_)


def columns(sizes: Mapping[str, int]) -> Leaf:
    """Matrices by name that lie side by side in one of ours, each with so many columns."""
    return beside([matrix(name) for name in sizes], tuple(sizes.values()), 1)


def beside(leaves: Sequence[Leaf], sizes: Sequence[int], axis: int) -> Leaf:
    """Leaves side by side along an axis, each with so many entries of it."""

    def split(ours: Tensor) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for leaf, part in zip(leaves, ours.split(tuple(sizes), axis), strict=True):
            named |= leaf.split(part)
        return named

    def join_(ours: Tensor, theirs: Mapping[str, Tensor]) -> None:
        for leaf, part in zip(leaves, ours.split(tuple(sizes), axis), strict=True):
            leaf.join_(part, theirs)

    return Leaf(split=split, join_=join_)


def interleaved(name: str) -> Leaf:
    """Gate and value [... 2 F], of which their tensor [... 2F] has the two of a column in turn."""
    return Leaf(
        split=lambda ours: {name: ours.mT.flatten(-2)},
        join_=lambda ours, theirs: ours.copy_(theirs[name].unflatten(-1, (-1, 2)).mT),
    )


def along(leaves: Sequence[Leaf], axis: int) -> Leaf:
    """Leaves side by side along an axis of ours that theirs have not."""

    def split(ours: Tensor) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for leaf, part in zip(leaves, ours.unbind(axis), strict=True):
            named |= leaf.split(part)
        return named

    def join_(ours: Tensor, theirs: Mapping[str, Tensor]) -> None:
        for leaf, part in zip(leaves, ours.unbind(axis), strict=True):
            leaf.join_(part, theirs)

    return Leaf(split=split, join_=join_)


def ordered(leaf: Leaf, order: Sequence[int], axis: int) -> Leaf:
    """A leaf of which they have the entries along an axis of ours in another order: theirs i is our `order[i]`."""
    inverse = sorted(range(len(order)), key=order.__getitem__)

    def taken(tensor: Tensor, places: Sequence[int]) -> Tensor:
        return tensor.index_select(axis, torch.tensor(places, device=tensor.device))

    def join_(ours: Tensor, theirs: Mapping[str, Tensor]) -> None:
        joined = torch.empty_like(ours, memory_format=torch.contiguous_format)
        leaf.join_(joined, theirs)
        ours.copy_(taken(joined, inverse))

    return Leaf(split=lambda ours: leaf.split(taken(ours, order)), join_=join_)


def shaped(leaf: Leaf, theirs: tuple[int, ...]) -> Leaf:
    """A leaf of which they have another shape, the numbers in the same order."""

    def join_(ours: Tensor, named: Mapping[str, Tensor]) -> None:
        leaf.join_(ours, {name: each.view(ours.shape) for name, each in named.items()})

    return Leaf(
        split=lambda tensor: {name: each.reshape(theirs) for name, each in leaf.split(tensor).items()}, join_=join_
    )


def gated(gate: str, up: str) -> Leaf:
    """The two matrices [in, 2, out] of a gated MLP."""
    return along([matrix(gate), matrix(up)], 1)


def zeros(path: str) -> Leaf:
    """A tensor of ours that theirs have not: zeros. Splitting another is an InputError that names `path`."""

    def split(ours: Tensor) -> dict[str, Tensor]:
        if not ours.is_meta and bool(ours.any()):
            raise InputError(
                f"{path}: expected zeros, because this model type has no such tensor, got others; it cannot be exported"
            )
        return {}

    return Leaf(split=split, join_=lambda ours, _: ours.zero_())


def scaled(name: str, factor: float) -> Leaf:
    """A tensor of the same shape, times `factor`; of a model that was imported it is 1.

    Nothing is multiplied on the device "meta", where torch imports itself half for a first product: 1.5 s.
    """
    return Leaf(
        split=lambda ours: {name: ours if ours.is_meta or factor == 1 else ours * factor}, join_=same(name).join_
    )


def repeated(leaf: Leaf, *copies: str) -> Leaf:
    """A tensor that they hold under further names too.

    Raises:  InputError when one of those that are joined is another tensor.
    """

    def split(ours: Tensor) -> dict[str, Tensor]:
        ((name, value),) = leaf.split(ours).items()
        return {name: value, **dict.fromkeys(copies, value)}

    def join_(ours: Tensor, theirs: Mapping[str, Tensor]) -> None:
        first, *others = theirs.items()
        for name, value in others:
            if not torch.equal(value, first[1]):
                raise InputError(
                    f"{name}: expected the values of {first[0]}, got others; nmoe shares them with the main model"
                )
        leaf.join_(ours, dict([first]))

    return Leaf(split=split, join_=join_)
