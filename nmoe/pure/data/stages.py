"""The stream of a mixture: how many windows of each source every stage reads, and which one stands where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby

import attrs

from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.data import order
from nmoe.pure.data.order import Turns


@attrs.frozen(kw_only=True)
class Ingredient:
    """A source, as far as the plan has to know it.

    name        within its data mixture; "" for a source that stands alone
    windows     windows of one pass
    max_passes  passes at most; None: as many as asked for
    content     digest of the tokens
    """

    name: str
    windows: int
    max_passes: float | None
    content: str


@attrs.frozen(kw_only=True)
class Recipe:
    """What a stage is to be.

    windows      length
    weights      of each source; 0: never
    temperature  weights count as weight**(1 / temperature)
    max_share    largest part of the stage that one source may have
    """

    name: str
    windows: int
    weights: tuple[float, ...]
    temperature: float = 1.0
    max_share: float = 1.0


@attrs.frozen(kw_only=True)
class Stage:
    """What a stage is.

    first   position in the stream of its first window
    quotas  windows of each source
    before  windows of each source in earlier stages
    """

    name: str
    first: int
    quotas: tuple[int, ...]
    before: tuple[int, ...]
    turns: Turns

    def end(self) -> int:
        """Position after its last window."""
        return self.first + self.turns.count


@attrs.frozen(kw_only=True)
class Stream:
    """A plan: sources, and stages in the order they are read.

    left_out  first and end of each stretch that nobody reads, in order; positions count the others
    """

    ingredients: tuple[Ingredient, ...]
    stages: tuple[Stage, ...]
    left_out: tuple[tuple[int, int], ...] = ()

    def windows(self) -> int:
        """Length."""
        return self.stages[-1].end() - sum(end - first for first, end in self.left_out)


@attrs.frozen(kw_only=True)
class Chosen:
    """Windows of one source that follow one another in the stream, though not without gaps.

    places   where in the stretch that was asked for they stand
    windows  which of the source's they are
    """

    source: int
    places: tuple[int, ...]
    windows: tuple[int, ...]


def plan(ingredients: Sequence[Ingredient], recipes: Sequence[Recipe]) -> Stream:
    """Exact numbers for every stage. A source continues in a stage where it was left in the one before.

    Raises:  InputError when the sources, with their limits, do not hold what a stage asks for.
    """
    named: list[tuple[str, tuple[int, ...]]] = []
    before = (0,) * len(ingredients)
    for recipe in recipes:
        if not recipe.windows:
            continue
        limits = [
            min(int(recipe.max_share * recipe.windows), _most(source, recipe.windows + read) - read)
            for source, read in zip(ingredients, before, strict=True)
        ]
        weights = _tempered(recipe.weights, recipe.temperature)
        held = sum(limit for limit, weight in zip(limits, weights, strict=True) if weight)
        if held < recipe.windows:
            raise InputError(
                f"stage {recipe.name}: expected sources that hold its {recipe.windows} windows with their limits on "
                f"passes and shares, got {held}; lower the tokens of the flow, raise max_passes or max_share, or add "
                "data"
            )
        quotas = order.quotas(weights, recipe.windows, limits)
        named.append((recipe.name, quotas))
        before = tuple(read + quota for read, quota in zip(before, quotas, strict=True))
    if not named:
        raise InputError("flow: expected a stage of one window at least, got none; raise the tokens of the flow")
    return Stream(ingredients=tuple(ingredients), stages=stages_of(named))


def single_source(windows: int, length: int, content: str) -> Stream:
    """The stream of one source that stands alone, a mixture of one: `length` windows, in as many passes as that takes.

    windows  of one pass
    """
    source = Ingredient(name="", windows=windows, max_passes=None, content=content)
    return plan([source], [Recipe(name="train", windows=length, weights=(1.0,))])


def stages_of(named: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[Stage, ...]:
    """The stages that have these names and quotas, in this order.

    Raises:  InputError when one has no quota above 0.
    """
    stages: list[Stage] = []
    before, first = (0,) * len(named[0][1]) if named else (), 0
    for name, quotas in named:
        stages.append(Stage(name=name, first=first, quotas=quotas, before=before, turns=order.turns(quotas)))
        before = tuple(read + quota for read, quota in zip(before, quotas, strict=True))
        first += sum(quotas)
    return tuple(stages)


def windows_read(stages: Sequence[Stage], position: int) -> tuple[tuple[int, ...], ...]:
    """How many of the stream's first `position` windows each stage took from each source: stage by stage."""
    return tuple(
        order.taken(stage.turns, min(max(position - stage.first, 0), stage.turns.count), num_sources=len(stage.quotas))
        for stage in stages
    )


def select(stream: Stream, first: int, num: int, key: Key) -> tuple[Chosen, ...]:
    """Which windows stand at positions `first` to `first` + `num`, gathered by source.

    Every position is computed by itself, from integers; nothing is kept between calls.

    Raises:  InputError when the stream is not as long.
    """
    if first < 0 or first + num > stream.windows():
        raise InputError(
            f"data.source: expected a stream of {first + num} windows, got {stream.windows()}; lower train.steps or "
            "raise the tokens of the flow"
        )
    chosen: list[Chosen] = []
    place = 0
    for begin, length in order.kept(first, num, stream.left_out):
        chosen += _stretch(stream, begin, length, key, place)
        place += length
    return tuple(chosen)


def _stretch(stream: Stream, first: int, num: int, key: Key, place: int) -> list[Chosen]:
    """`select` of a stretch with nothing left out, whose first window stands at `place`."""
    reads: list[tuple[int, int, int]] = []
    for stage in stream.stages:
        for position in range(max(first, stage.first), min(first + num, stage.end())):
            source, earlier = order.source_at(stage.turns, position - stage.first)
            reads.append((source, stage.before[source] + earlier, place + position - first))
    chosen: list[Chosen] = []
    for source, group in groupby(sorted(reads), key=lambda read: read[0]):
        # a source's windows of a stretch are consecutive in its own order
        _, indices, places = zip(*group, strict=True)
        ingredient = stream.ingredients[source]
        # one source alone takes the key as it is: the order that checkpoints of such runs hold a position in
        own = key.fold(ingredient.name) if ingredient.name else key
        windows = order.windows(indices[0], len(indices), ingredient.windows, own)
        chosen.append(Chosen(source=source, places=places, windows=tuple(map(int, windows))))
    return chosen


def identity(stream: Stream) -> str:
    """SHA-256, in hex, of everything that decides which tokens the stream holds, but for the seed."""
    content = {
        "sources": [attrs.astuple(source) for source in stream.ingredients],
        "stages": [(stage.name, stage.first, stage.quotas) for stage in stream.stages],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _most(source: Ingredient, enough: int) -> int:
    """Windows that a source gives at most; `enough` when nothing limits it."""
    return enough if source.max_passes is None else int(source.max_passes * source.windows)


def _tempered(weights: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Weights flattened by the temperature, or as they are at 1."""
    if temperature == 1.0:
        return tuple(weights)
    largest = max(weights)
    # to 32 bits, because the last ones of a power are not the same on every machine
    return tuple(max(1, round((weight / largest) ** (1 / temperature) * 2**32)) if weight else 0 for weight in weights)
