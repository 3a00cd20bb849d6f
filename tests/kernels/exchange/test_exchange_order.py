"""No buffer of the exchange is overwritten while it is read, however ranks run ahead of each other: a model check.

What a rank reads and writes, and where it meets the others, is recorded from the real passes; then ranks that do so are
interleaved at random. A rank's word that its writes are done also says that it has read what it read before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels.exchange import push as moves
from nmoe.effects.kernels.moe import experts
from nmoe.effects.parallel.exchange import arena, device, products
from tests.kernels.exchange.ranks import case, open_ranks, shared
from tests.kernels.exchange.test_exchange import TILES, WIDE

RANKS = 3
Stretch = tuple[tuple[str, str], ...]
"""Between two meetings: ("read" or "write", field), in order."""


@pytest.fixture(scope="module", params=["plain", "dedup", "fp8", "fp8, dedup"])
def passes(request: pytest.FixtureRequest) -> Iterator[tuple[list[Stretch], list[Stretch]]]:
    """Stretches of a forward and of a backward pass."""
    fp8 = "fp8" in request.param
    c = case("random", 8, *((128, 128) if fp8 else (16, 16)), 4, 2)
    exchanges = open_ranks(c, [4, 4], dedup="dedup" in request.param, fp8=fp8)
    first = exchanges[0]
    # rows and their codes land in the same memory, which is what counts
    fields = [each.name for each in attrs.fields(arena.Fields)[:-1] if each.name != "land_codes"]
    names = {getattr(first.fields, name).offset: name for name in fields}
    log: list[tuple[str, str]] = []

    def writing(write: Any, *arguments: Any, **named: Any) -> Any:
        # the arguments of a push: ..., addresses, offset in an arena, ...; recorded of the first rank alone
        if any(each is first.addresses for each in arguments):
            offsets = [each for each in arguments if isinstance(each, int) and each in names]
            log.append(("write", names[offsets[0]]))
        return write(*arguments, **named)

    def reading(read: Any, raw: Any, field: arena.Field) -> Any:
        if raw is first.raw and names[field.offset] != "arrived":
            log.append(("read", names[field.offset]))
        return read(raw, field)

    def meeting(barrier: Any, e: Any, **named: Any) -> Any:
        if e is first and named["signal"]:
            log.append(("barrier", ""))
        return barrier(e, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("push_", "push_words_", "push_counts_"):
            patch.setattr(moves, name, partial(writing, getattr(moves, name)))
        for module in (experts, products.fp8):
            patch.setattr(module, "grouped_gemm_push_", partial(writing, module.grouped_gemm_push_))
        for module in (device, products):
            patch.setattr(module, "view", partial(reading, module.view))
        patch.setattr(device, "barrier_", partial(meeting, device.barrier_))
        shared(c, exchanges, [4, 4], WIDE if fp8 else TILES)
    stretches: list[list[tuple[str, str]]] = [[]]
    for each in log:
        if each[0] == "barrier":
            stretches.append([])
        else:
            stretches[-1].append(each)
    # the stretch after the last meeting of a pass and the one before the first of the next are one
    assert len(stretches) == 6, stretches
    end = next(at for at, each in enumerate(stretches[3]) if each[0] == "write")
    yield (
        [*map(tuple, stretches[:3]), tuple(stretches[3][:end])],
        [tuple(stretches[3][end:]), *map(tuple, stretches[4:])],
    )


@attrs.define
class Rank:
    """Where a rank is, and what it has."""

    at: int = 0  # stretch
    step: int = 0  # event of it
    told: int = 0  # meetings
    reads: set[str] = attrs.field(factory=set)
    version: dict[tuple[str, int], tuple[str, int]] = attrs.field(factory=dict)  # place, source -> field, stretch


def fault(
    program: Sequence[Stretch], *, seed: int, ends: bool = True, places: Mapping[str, str] = MappingProxyType({})
) -> str:
    """What goes wrong in one interleaving of ranks that all run `program`, or "".

    ends    whether a read is over when its rank says so at the next meeting; False: one stretch later
    places  field -> another one in whose place it lies
    """
    chance = random.Random(seed)
    ranks = [Rank() for _ in range(RANKS)]
    favourite = 0
    while True:
        able = [
            number
            for number, r in enumerate(ranks)
            if r.at < len(program) and (r.step > 0 or all(other.told >= r.at for other in ranks))
        ]
        if not able:
            return "" if all(r.at == len(program) for r in ranks) else "ranks wait for each other"
        # now and then one runs ahead as far as it can
        favourite = chance.randrange(RANKS) if chance.random() < 0.1 else favourite
        number = favourite if favourite in able else chance.choice(able)
        r = ranks[number]
        if r.step == 0 and not ends:
            r.reads = {each for each in r.reads if ("read", each) in program[r.at - 1]}
        if r.step == len(program[r.at]):
            r.at, r.step, r.told = r.at + 1, 0, r.told + 1
            if ends:
                r.reads = set()
            continue
        kind, field = program[r.at][r.step]
        place = places.get(field, field)
        r.step += 1
        if kind == "read":
            before = [*program[: r.at], program[r.at][: r.step]]
            wanted = max((at for at, events in enumerate(before) if ("write", field) in events), default=-1)
            if any(r.version.get((place, source)) != (field, wanted) for source in range(RANKS)):
                return f"stretch {r.at} of rank {number} reads {field} that is not of stretch {wanted}"
            r.reads.add(place)
        else:
            for other, peer in enumerate(ranks):
                if place in peer.reads:
                    return f"stretch {r.at} of rank {number} writes {field} that rank {other} still reads"
                peer.version[place, number] = field, r.at


def program(passes: tuple[list[Stretch], list[Stretch]]) -> list[Stretch]:
    """Two layers forward, two backward, twice; with a pass that is computed again and one that has no backward."""
    forward, backward = passes
    whole: list[Stretch] = []
    for each in (forward, forward, forward, backward, backward, forward, forward, backward, forward, backward):
        whole[-1:] = [(*(whole[-1] if whole else ()), *each[0])]
        whole += each[1:]
    return whole


def faults(program: Sequence[Stretch], **how: Any) -> list[str]:
    """Of 200 interleavings."""
    return [said for seed in range(200) if (said := fault(program, seed=seed, **how))]


def test_the_passes_reuse_their_buffers_safely(passes: tuple[list[Stretch], list[Stretch]]) -> None:
    forward, backward = passes
    assert ("write", "land") in forward[1] and ("read", "land") in forward[2]
    assert {("write", "land_gradient"), ("write", "gate")} <= set(backward[0]) and ("write", "land") in backward[1]
    assert faults(program(passes)) == []


def test_a_meeting_left_out_is_found(passes: tuple[list[Stretch], list[Stretch]]) -> None:
    """Whichever it is: before the plan, the experts or the combination."""
    whole = program(passes)
    for at in range(3):
        assert faults([*whole[:at], (*whole[at], *whole[at + 1]), *whole[at + 2 :]]), at


def test_one_landing_buffer_for_both_is_found(passes: tuple[list[Stretch], list[Stretch]]) -> None:
    assert faults(program(passes), places={"land_gradient": "land"})


def test_rows_read_after_a_rank_has_spoken_are_found(passes: tuple[list[Stretch], list[Stretch]]) -> None:
    assert faults(program(passes), ends=False)
