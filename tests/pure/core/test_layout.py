"""Where parameters lie when ranks share them out: every element has one rank that answers for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.checkpoint.pieces import arena_pieces, gaps
from nmoe.pure.core.layout import ALIGNMENT, ArenaLayout, layout
from nmoe.pure.core.spec import Role, spec_tree
from nmoe.pure.core.tree import param, record


def zeros(generator: torch.Generator, shape: tuple[int, ...], dims: dict[str, int]) -> torch.Tensor:
    return torch.zeros(shape)


@record
class Few:
    """Parameters of very different sizes in two arenas."""

    large: torch.Tensor = param("A B", Role.MATRIX, zeros)
    small: torch.Tensor = param("A", Role.MATRIX, zeros)
    middle: torch.Tensor = param("B A", Role.MATRIX, zeros)
    expert: torch.Tensor = param("E A", Role.EXPERT, zeros)
    other: torch.Tensor = param("E B", Role.EXPERT, zeros)


worlds = st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 3), (4, 2), (1, 5)])
sizes = st.fixed_dictionaries({"A": st.integers(1, 90), "B": st.integers(1, 90), "E": st.sampled_from([4, 8])})


rules = st.sampled_from(["adamw", "muon"])


def arenas(dims: dict[str, int], world: tuple[int, int], bucket: int, rule: str) -> tuple[ArenaLayout, ...]:
    shared, replicas = world
    return layout(
        spec_tree(Few),
        dims,
        optimizers={"dense": rule, "expert": rule},
        compute="bf16",
        moments="fp32",
        microbatches=64,
        world=shared,
        replicas=replicas,
        bucket=bucket,
    )


@given(dims=sizes, world=worlds, bucket=st.integers(1, 9000), rule=rules)
def test_ranks_share_out_every_bucket_in_equal_parts(
    dims: dict[str, int], world: tuple[int, int], bucket: int, rule: str
) -> None:
    for arena in arenas(dims, world, bucket, rule):
        assert arena.parts == (world[1] if arena.policy.shard else world[0] * world[1])
        assert gaps(arena.size, arena.buckets()) == ()
        found: list[tuple[int, int]] = []
        for part in range(arena.parts):
            stretches = arena.stretches(part)
            found += [(each.begin, each.end) for each in stretches]
            held = [(each.at, each.at + each.end - each.begin) for each in stretches]
            assert gaps(arena.held(), held) == () and all(each.begin % ALIGNMENT == 0 for each in stretches)
        assert gaps(arena.size, found) == ()
        ends = [slot.offset + slot.size() for slot in arena.slots]
        for low, high in arena.buckets():
            inside = [slot for slot in arena.slots if low <= slot.offset < high]
            assert inside and all(slot.offset + slot.size() <= high for slot in inside), "parameters are not cut"
            assert high == arena.size or arena.parts > 1 and high - low >= bucket
        assert ends == sorted(ends)
        assert len({slot.path for slot in arena.slots}) == len(arena.slots)
        starts = [slot.offset for slot in arena.slots]
        assert all(start % ALIGNMENT == 0 and start >= end for start, end in zip(starts, [0, *ends], strict=False))


@given(dims=sizes, world=worlds, bucket=st.integers(1, 9000))
def test_a_parameter_of_muon_lies_in_the_part_of_one_rank(
    dims: dict[str, int], world: tuple[int, int], bucket: int
) -> None:
    for arena in arenas(dims, world, bucket, "muon"):
        for slot in arena.slots:
            shares = [arena.share(slot, part) for part in range(arena.parts)]
            assert sorted(share.end - share.begin for share in shares) == [0] * (arena.parts - 1) + [slot.size()]
            owners = [part for part in range(arena.parts) for own in arena.owned(part) if slot in own]
            assert [shares[part].end - shares[part].begin for part in owners] == [slot.size()]
        for part in range(arena.parts):
            for own, run in zip(arena.owned(part), arena.stretches(part), strict=True):
                assert all(run.begin <= slot.offset and slot.offset + slot.size() <= run.end for slot in own)


@given(dims=sizes, world=worlds, bucket=st.integers(1, 9000), rule=rules)
def test_pieces_of_all_ranks_are_every_element_once(
    dims: dict[str, int], world: tuple[int, int], bucket: int, rule: str
) -> None:
    """Also of what a rank holds only a part of: it lies there where the arena has it, less what others have."""
    shared, replicas = world
    parts: dict[str, list[tuple[int, int]]] = {}
    for rank in range(shared * replicas):
        place, replica = rank % shared, rank // shared
        for arena in arenas(dims, world, bucket, rule):
            part = replica if arena.policy.shard else rank
            flat = torch.full((arena.size,), -1)
            for slot in arena.slots:
                first = place * slot.size() if arena.policy.shard else 0
                flat[slot.offset : slot.offset + slot.size()] = torch.arange(first, first + slot.size())
            moment = torch.cat([flat[each.begin : each.end] for each in arena.stretches(part)])
            kinds = {"value": flat, "first": moment}
            for piece in arena_pieces(arena, kinds, dims, rank=place, world=shared, part=part):
                assert torch.equal(piece.tensor, torch.arange(piece.begin, piece.end())), piece
                parts.setdefault(piece.name, []).append((piece.begin, piece.end()))
    wholes = {"large": "AB", "small": "A", "middle": "BA", "expert": "EA", "other": "EB"}
    for path, letters in wholes.items():
        size = torch.Size([dims[letter] for letter in letters]).numel()
        for kind in ("value", "first"):
            assert gaps(size, parts[f"param/{path}/{kind}"]) == ()


@pytest.mark.parametrize(
    ("microbatches", "world", "replicas", "experts", "others"),
    [
        (1, 1, 1, False, False),
        (1, 1, 2, True, True),
        (1, 2, 1, False, True),  # one product over the rows of both ranks
        (1, 2, 2, True, True),
        (2, 1, 1, False, False),
        (2, 2, 2, False, False),
    ],
)
def test_gradients_are_summed_in_fp32(
    microbatches: int, world: int, replicas: int, experts: bool, others: bool
) -> None:
    """Over microbatches where they are, over ranks in memory apart."""
    found = layout(
        spec_tree(Few),
        {"A": 8, "B": 8, "E": 4},
        optimizers={"dense": "adamw", "expert": "adamw"},
        compute="bf16",
        moments="fp32",
        microbatches=microbatches,
        world=world,
        replicas=replicas,
    )
    found = tuple(arena for arena in found if arena.storage is torch.bfloat16)
    assert {arena.gradient for arena in found} == {torch.float32 if microbatches > 1 else torch.bfloat16}
    assert {bool(arena.policy.shard): arena.has_sums() for arena in found} == {True: experts, False: others}
