"""Frozen records as trees: the one file with metaprogramming."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar, dataclass_transform

import attrs
import torch.utils._pytree as pytree  # pyright: ignore[reportMissingTypeStubs]

C = TypeVar("C", bound=type)


def param(axes: str, role: Enum, init: Callable[..., Any]) -> Any:
    """A record field that holds a parameter, as in `up: Tensor = param("E D 2 F", Role.EXPERT, normal("D"))`.

    What the words mean is `spec`'s business; it stands here because type checkers want a record's fields beside it.
    """
    return attrs.field(metadata={"param": (axes, role, init)})


@dataclass_transform(frozen_default=True, field_specifiers=(attrs.field, param))
def record(cls: C) -> C:
    """A value of the computation: immutable, compared by identity, a pytree, and buildable inside `torch.compile`.

    Fields hold tensors, records, tuples, numbers or functions; never lists or dicts, whose order is not a type.
    """
    frozen: Any = attrs.frozen(init=False, eq=False)(cls)
    names = [field.name for field in attrs.fields(frozen)]
    # The constructor attrs writes binds `object.__setattr__.__get__`, which dynamo refuses to trace; this one it
    # traces. It may name nothing but builtins: dynamo looks up no global of generated code.
    body = "".join(f"\n    object.__setattr__(self, {name!r}, {name})" for name in names) or "\n    pass"
    scope: dict[str, Any] = {}
    exec(f"def __init__(self, {', '.join(names)}):{body}", scope)
    frozen.__init__ = scope["__init__"]
    frozen.__is_record__ = True

    def flatten(node: Any) -> tuple[list[Any], None]:
        return [getattr(node, name) for name in names], None

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], None]:
        kids: list[tuple[Any, Any]] = [(pytree.GetAttrKey(name), getattr(node, name)) for name in names]
        return kids, None

    def unflatten(kids: Any, _: None) -> Any:
        return frozen(*kids)

    pytree.register_pytree_node(
        frozen,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{frozen.__module__}.{frozen.__qualname__}",
    )
    return frozen


def children(node: Any) -> tuple[tuple[str, Any], ...] | None:
    """Name and value of each child of a record or tuple; None for a leaf."""
    if getattr(type(node), "__is_record__", False):
        return tuple((field.name, getattr(node, field.name)) for field in attrs.fields(type(node)))
    if isinstance(node, tuple):
        kids: tuple[Any, ...] = node
        return tuple((str(index), kid) for index, kid in enumerate(kids))
    return None


def map(fn: Callable[..., Any], node: Any, *rest: Any, path: str = "") -> Any:
    """The tree of `fn(path, leaf, *leaves of rest)`; paths read `blocks.3.ffn.up`.

    node, rest  trees of one structure
    Raises:     ValueError when a tree of `rest` has other children than `node`.
    """
    kids = children(node)
    if kids is None:
        return fn(path, node, *rest)
    others = [dict(children(other) or ()) for other in rest]
    for other in others:
        if tuple(other) != tuple(name for name, _ in kids):
            raise ValueError(
                f"tree.map: expected the same children of every tree at '{path}', got "
                f"{[name for name, _ in kids]} and {list(other)}; pass trees of one record"
            )
    prefix = f"{path}." if path else ""
    mapped = [map(fn, kid, *(other[name] for other in others), path=prefix + name) for name, kid in kids]
    return tuple(mapped) if isinstance(node, tuple) else type(node)(*mapped)


def unzip(like: Any, both: Any) -> tuple[Any, ...]:
    """The tree of the first results, of the second ones and so on, of a `map` whose function returned tuples.

        params, state = unzip(params, map(update, params, grads, state))

    like     a tree that was mapped; its leaves say where the tuples are
    both     what `map` returned
    Raises:  ValueError when `like` has no leaf, or tuples differ in length.
    """
    sizes: set[int] = set()
    map(lambda path, _, results: sizes.add(len(results)), like, both)
    if len(sizes) != 1:
        raise ValueError(
            f"tree.unzip: expected tuples of one length at the leaves, got lengths {sorted(sizes)}; return as many "
            "results for every leaf"
        )
    (size,) = sizes
    return tuple(map(lambda path, _, results, place=place: results[place], like, both) for place in range(size))


def leaves(node: Any) -> tuple[tuple[str, Any], ...]:
    """Path and value of every leaf, in the order of the fields."""
    pairs: list[tuple[str, Any]] = []
    map(lambda path, leaf: pairs.append((path, leaf)), node)
    return tuple(pairs)
