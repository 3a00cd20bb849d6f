"""Several kinds of attention in one model, by layer: each part has axis letters, tables and ops of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.spec import renamed
from nmoe.pure.core.tree import record


@attrs.frozen(kw_only=True)
class Part:
    """One of the attentions of a model."""

    place: int  # among the parts
    letter: str  # of its table
    kind: Any  # Kind
    section: Any


@record
class MixedOps:
    """The records of ops of the parts, by place."""

    parts: tuple[Any, ...]


def parts(c: sections.Mixed, kind_of: Callable[[Any], Any]) -> dict[str, Part]:
    """The attentions of a model by their letter."""
    return {
        letter: Part(place=place, letter=letter, kind=kind_of(section), section=section)
        for place, (letter, section) in enumerate(c.parts().items())
    }


def at_layer(c: sections.Mixed, part: Part, layer: int) -> Part:
    """The part of one layer, with the section of that layer."""
    return attrs.evolve(part, section=part.kind.at_layer(c.parts()[part.letter], layer))


def at_tokens(c: sections.Mixed, of: Mapping[str, Part], tokens: int) -> sections.Mixed:
    """The section after so many tokens of the run."""
    return attrs.evolve(
        c, **{letter: of[letter].kind.at_tokens(section, tokens) for letter, section in c.parts().items()}
    )


def specs(c: Part) -> Any:
    """Specs of the part's attention; its own axis letters carry the letter of its table."""
    return tree.map(lambda _, spec: renamed(spec, _letters(c)), c.kind.specs(c.section))


def dims(of: Mapping[str, Part]) -> dict[str, int]:
    """Sizes of the axes that only attention has, of every part."""
    return {_letters(part)[axis]: size for part in of.values() for axis, size in part.kind.dims(part.section).items()}


def _letters(c: Part) -> dict[str, str]:
    """Axis letter of the kind -> of the part."""
    return {axis: f"{axis}.{c.letter}" for axis in c.kind.dims(c.section)}


def tables(of: Mapping[str, Part], num_positions: int) -> tuple[Any, ...]:
    """The constant tensors of every part, by place."""
    return tuple(part.kind.tables(part.section, num_positions) for part in of.values())


def apply(
    p: Any,
    x: Tensor,
    tables: tuple[Any, ...],
    norm: Callable[..., Tensor],
    ops: MixedOps,
    c: Part,
    documents: Any = (),
    *,
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """The part's attention; see that of its kind."""
    return c.kind.apply(p, x, tables[c.place], norm, ops.parts[c.place], c.section, documents, eps=eps)


def empty_cache(c: Part, num_sequences: int, num_tokens: int, like: Tensor) -> Any:
    """The cache of the part's kind before the first token."""
    return c.kind.cache.empty(c.section, num_sequences, num_tokens, like)


def extend(
    p: Any,
    x: Tensor,
    cache: Any,
    new: Any,
    tables: tuple[Any, ...],
    norm: Callable[..., Tensor],
    ops: MixedOps,
    c: Part,
    *,
    eps: float,
) -> tuple[Tensor, Any]:
    """The part's attention of new tokens; see that of its kind."""
    return c.kind.cache.extend(p, x, cache, new, tables[c.place], norm, ops.parts[c.place], c.section, eps=eps)
