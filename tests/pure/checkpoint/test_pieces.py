"""Any division of a tensor among writers meets any division among readers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.checkpoint.pieces import Piece, Stored, arena_pieces, copies, gaps, share, whole
from nmoe.pure.core import tree
from nmoe.pure.core.layout import layout
from nmoe.pure.core.spec import Role, spec_tree
from nmoe.pure.core.tree import param, record


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """A division of 0 to `size`, empty parts included."""
    edges = sorted(draw(st.lists(st.integers(0, size), max_size=7)))
    return list(itertools.pairwise([0, *edges, size]))


@given(data=st.data(), size=st.integers(0, 60), itemsize=st.sampled_from([1, 2, 4, 8]))
def test_what_one_division_wrote_any_other_reads(data: st.DataObject, size: int, itemsize: int) -> None:
    """Bytes written through one division and read through another come back in their places."""
    content = bytes(data.draw(st.randoms(use_true_random=False)).randbytes(size * itemsize))
    files: dict[str, bytes] = {}
    stored: list[Stored] = []
    for number, (begin, end) in enumerate(data.draw(cuts(size))):
        lead = data.draw(st.integers(0, 9))
        files[f"f{number}"] = bytes(lead) + content[begin * itemsize : end * itemsize]
        stored.append(Stored(file=f"f{number}", begin=begin, end=end, offset=lead))
    stored = data.draw(st.permutations(stored))
    assert gaps(size, [(each.begin, each.end) for each in stored]) == ()
    for begin, end in data.draw(cuts(size)):
        found = bytearray()
        for copy in copies(begin, end, itemsize, stored):
            assert copy.to == len(found) and copy.size > 0
            found += files[copy.file][copy.offset : copy.offset + copy.size]
        assert found == content[begin * itemsize : end * itemsize]


@given(data=st.data(), size=st.integers(1, 40))
def test_a_division_with_a_hole_or_an_overlap_is_told(data: st.DataObject, size: int) -> None:
    """Counted out element by element."""
    parts = data.draw(cuts(size))
    lost = data.draw(st.integers(0, 2 * len(parts)))
    more = data.draw(
        st.lists(st.tuples(st.integers(0, 45), st.integers(0, 45)).map(lambda x: (min(x), max(x))), max_size=1)
    )
    parts = data.draw(st.permutations([*parts[:lost], *parts[lost + 1 :], *more]))
    counts = [sum(begin <= element < end for begin, end in parts) for element in range(46)]
    exact = counts[:size] == [1] * size and not any(counts[size:])
    assert (gaps(size, parts) == ()) == exact


def test_gaps_are_named() -> None:
    assert gaps(9, [(0, 3), (5, 7)]) == ("elements 3 to 5 are missing", "elements 7 to 9 are missing")
    assert gaps(4, [(0, 3), (2, 5)]) == ("elements 2 to 3 are there twice", "elements 4 to 5 are beyond the end")


@given(size=st.integers(0, 50), count=st.integers(1, 9))
def test_shares_of_all_ranks_are_the_piece(size: int, count: int) -> None:
    piece = Piece(name="a", shape=(100,), begin=7, tensor=torch.arange(size))
    shares = [share(piece, index, count) for index in range(count)]
    assert torch.equal(torch.cat([each.tensor for each in shares]), piece.tensor)
    assert [each.begin - 7 for each in shares if each.tensor.numel()] == [
        int(each.tensor[0]) for each in shares if each.tensor.numel()
    ]
    assert max(each.tensor.numel() for each in shares) - min(each.tensor.numel() for each in shares) <= 1


@record
class Two:
    """An expert tensor and one that every rank has."""

    up: torch.Tensor = param("E D", Role.EXPERT, lambda generator, shape, dims: torch.zeros(shape))
    down: torch.Tensor = param("D E", Role.MATRIX, lambda generator, shape, dims: torch.zeros(shape))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_pieces_of_all_ranks_are_the_parameters(world: int) -> None:
    """Each rank numbers its elements by their place in the whole; the pieces put them there."""
    dims = {"E": 4, "D": 3}
    specs = spec_tree(Two)
    found: dict[str, list[Piece]] = {}
    rules = {"dense": "adamw", "expert": "adamw"}
    for rank in range(world):
        for arena in layout(specs, dims, optimizers=rules, compute="bf16", moments="fp32", microbatches=1, world=world):
            flat = torch.full((arena.size,), -1)
            for slot in arena.slots:
                first = rank * slot.size() if slot.path == "up" else 0
                flat[slot.offset : slot.offset + slot.size()] = torch.arange(first, first + slot.size())
            part = 0 if arena.policy.shard else rank
            for piece in arena_pieces(arena, {"value": flat, "first": flat}, dims, rank=rank, world=world, part=part):
                found.setdefault(piece.name, []).append(piece)
    assert set(found) == {f"param/{path}/{kind}" for path, _ in tree.leaves(specs) for kind in ("value", "first")}
    for name, parts in found.items():
        assert {piece.shape for piece in parts} == {(4, 3) if "up" in name else (3, 4)}
        for piece in parts:
            assert torch.equal(piece.tensor, torch.arange(piece.begin, piece.end()))
        assert gaps(12, [(piece.begin, piece.end()) for piece in parts]) == ()


def test_a_whole_tensor_without_axes_has_one_element() -> None:
    piece = whole("updates", torch.tensor(3))
    assert (piece.shape, piece.begin, piece.end(), math.prod(piece.shape)) == ((), 0, 1, 1)
