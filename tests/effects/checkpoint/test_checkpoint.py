"""Saves and loads on a real disk: in the background, on any number of ranks, kept as asked for."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.effects.checkpoint import shard
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.reader import entries, load_, restore_
from nmoe.effects.checkpoint.writer import Saved, SaveError, open_writer, prune
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import Piece, share, whole
from nmoe.pure.checkpoint.retention import Keep
from tests.effects.checkpoint.memory_fs import MemoryFs
from tests.effects.checkpoint.saves import ROOT, failing, manifest_in, number_in, on_ranks, pieces, values


class Held(MemoryFs):
    """Does not sync before it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()
        self.let.set()

    def sync(self, handle: int) -> None:
        assert self.let.wait(60)
        super().sync(handle)


def test_what_is_saved_is_what_was_there_when_save_was_called() -> None:
    fs, tensors = Held(), values(1)
    with open_writer(fs, ROOT, keep=Keep()) as writer:
        fs.let.clear()
        assert writer.save(pieces(tensors), step=1, meta={"number": 1}) is None
        writer.staged()
        for tensor in tensors.values():
            tensor.zero_()
        assert writer.poll() is None and number_in(fs) is None
        fs.let.set()
        saved = writer.wait()
        assert isinstance(saved, Saved) and (saved.step, saved.removed) == (1, ())
        assert writer.wait() is None and writer.poll() is None
    assert number_in(fs) == 1


def test_one_save_is_in_flight() -> None:
    """The next one waits for it and hands out what became of it."""
    fs = Held()
    with open_writer(fs, ROOT, keep=Keep()) as writer:
        fs.let.clear()
        writer.save(pieces(values(1)), step=1, meta={"number": 1})
        threading.Timer(0.2, fs.let.set).start()
        before = writer.save(pieces(values(2)), step=2, meta={"number": 2})
        assert before is not None and before.step == 1
    assert number_in(fs) == 2, "the end of the block waits for the last one"


def test_an_error_of_a_save_reaches_who_is_in_the_middle_of_another() -> None:
    fs = MemoryFs()
    with pytest.raises(KeyError) as caught, open_writer(fs, ROOT, keep=Keep()) as writer:
        with failing(fs, ["rename"], 0, _no_space):
            writer.save(pieces(values(1)), step=1, meta={})
            while writer._flight is not None and not writer._flight.done():  # noqa: SLF001
                pass
        raise KeyError("training")
    assert any("the save of step 1" in note for note in caught.value.__notes__)


def test_a_commit_whose_clean_up_failed_is_a_save() -> None:
    fs = MemoryFs()
    with open_writer(fs, ROOT, keep=Keep(last=1)) as writer:
        writer.save(pieces(values(1)), step=1, meta={"number": 1})
        writer.wait()
        with failing(fs, ["remove"], 0, _no_space):
            writer.save(pieces(values(2)), step=2, meta={"number": 2})
            saved = writer.wait()
        assert saved is not None and (saved.step, saved.removed) == (2, ())
        assert "deleting what step 2 replaces" in saved.undeleted[0] and "No space left" in saved.undeleted[0]
        assert number_in(fs) == 2
        writer.save(pieces(values(3)), step=3, meta={"number": 3})
    manifest = manifest_in(fs)
    assert manifest is not None and manifest.parent is not None
    assert manifest.parent.name == saved.name, "the next one follows what was committed"


def _no_space(size: int) -> int | None:
    raise OSError(28, "No space left on device")


def test_a_run_follows_on_from_what_it_was_given(tmp_path: Path) -> None:
    """Lineage and parent stay; a return to an earlier step is newer than what it leaves."""
    root = tmp_path / "checkpoints"
    with open_writer(Disk(), root, keep=Keep(last=9)) as writer:
        for step in (10, 20):
            writer.save(pieces(values(step)), step=step, meta={"number": step})
    first = entries(Disk(), root)[-1].manifest
    with open_writer(Disk(), root, keep=Keep(last=9), parent=first) as writer:
        writer.save(pieces(values(15)), step=15, meta={"number": 15})
    found = manifest_in(Disk(), root)
    assert first is not None and found is not None and found.parent is not None
    assert (found.step, found.attempt, found.lineage) == (15, 2, first.lineage)
    assert (found.parent.name, first.parent) == (first.name(), None)
    assert number_in(Disk(), root) == 15


def test_a_fresh_run_does_not_write_over_another(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with open_writer(Disk(), root, keep=Keep()) as writer:
        writer.save(pieces(values(1)), step=1, meta={"number": 1})
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"expected no checkpoints of a new run, got step-00000001.0001-0001"):
        with open_writer(Disk(), root, keep=Keep()):
            pass
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_kept_as_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    removed: list[str] = []
    with open_writer(Disk(), root, keep=Keep(last=2, every=4, best=1)) as writer:
        for step, score in enumerate([9.0, 1.0, 5.0, 6.0, 7.0, 8.0, 9.0], 1):
            writer.save(pieces(values(step)), step=step, meta={"number": step}, score=score)
            saved = writer.wait()
            assert saved is not None
            removed += saved.removed
    assert [name[:13] for name in sorted(os.listdir(root))[1:]] == [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    assert [int(name[5:13]) for name in removed] == [1, 3, 5]
    os.mkdir(root / ".tmp-step-00000008.0001-0008")
    assert [int(name[5:13]) for name in prune(Disk(), root, Keep(last=1))] == [2, 4, 6]
    assert sorted(os.listdir(root)) == ["LEASE", "step-00000007.0001-0007"]


def test_a_damaged_one_is_not_counted_and_not_deleted(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with open_writer(Disk(), root, keep=Keep(last=9)) as writer:
        for step in (1, 2, 3):
            writer.save(pieces(values(step)), step=step, meta={"number": step})
    damaged = root / "step-00000003.0001-0003"
    (damaged / "manifest.json").write_text("{")
    parent = manifest_in(Disk(), root)
    with open_writer(Disk(), root, keep=Keep(last=2), parent=parent) as writer:
        writer.save(pieces(values(4)), step=4, meta={"number": 4})
    assert [int(name[5:13]) for name in sorted(os.listdir(root))[1:]] == [2, 3, 4]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([whole("a", torch.zeros(2)), whole("a", torch.ones(2))], "one piece of 'a' on a rank, got 2"),
        ([whole("a", torch.zeros(2, dtype=torch.complex64))], "expected 'a' in a format of F64"),
    ],
)
def test_pieces_that_cannot_be_saved_are_told_at_once(wrong: list[Piece], told: str) -> None:
    with open_writer(MemoryFs(), ROOT, keep=Keep()) as writer, pytest.raises(InputError, match=told):
        writer.save(wrong, step=1, meta={})


@pytest.mark.parametrize(
    ("pieces_of", "told"),
    [
        (lambda rank: whole("a", torch.zeros(4)), "there twice"),
        (lambda rank: Piece(name="a", shape=(9,), begin=4 * rank, tensor=torch.zeros(4)), "8 to 9 are missing"),
        (lambda rank: Piece(name="a", shape=(8 + rank,), begin=4 * rank, tensor=torch.zeros(4)), "got .* on rank 1"),
    ],
)
def test_ranks_whose_pieces_are_no_whole_commit_nothing(pieces_of: Any, told: str) -> None:
    fs = MemoryFs()

    def attempt(rank: int, all_gather_text: Any) -> None:
        with open_writer(fs, ROOT, keep=Keep(), rank=rank, world=2, all_gather_text=all_gather_text) as writer:
            writer.save([pieces_of(rank)], step=1, meta={})

    failed = on_ranks(2, attempt)
    assert all(isinstance(error, SaveError) for error in failed)
    with pytest.raises(SaveError, match=told):
        raise failed[0]  # pyright: ignore[reportGeneralTypeIssues]
    assert fs.names(ROOT) == ["LEASE"]


def test_an_error_of_one_rank_reaches_all(tmp_path: Path) -> None:
    """Rank 1 cannot write its file; rank 0 commits nothing and takes the whole folder away."""

    class Full(MemoryFs):
        def create(self, path: Path, size: int) -> int:
            if path.name == "rank-001.safetensors":
                raise OSError(28, "No space left on device")
            return super().create(path, size)

    fs = Full()

    def attempt(rank: int, all_gather_text: Any) -> None:
        with open_writer(fs, ROOT, keep=Keep(), rank=rank, world=2, all_gather_text=all_gather_text) as writer:
            writer.save(pieces(values(1), rank, 2), step=1, meta={"number": 1})

    failed = on_ranks(2, attempt)
    assert all("No space left on device on rank 1" in str(error) for error in failed), failed
    assert fs.names(ROOT) == ["LEASE"]


@given(worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=4), chunk_bytes=st.sampled_from([999, 1 << 20]))
@settings(max_examples=6)
def test_any_number_of_ranks_reads_what_any_other_wrote(worlds: list[int], chunk_bytes: int) -> None:
    """Saved, loaded and saved again by other numbers of ranks: every digest stays, and every bit."""
    fs, state, digests = MemoryFs(), values(3), set[str]()
    for number, world in enumerate(worlds, 1):
        loaded: list[dict[str, torch.Tensor]] = [{} for _ in range(world)]

        def attempt(
            rank: int, all_gather_text: Any, world: int = world, number: int = number, loaded: Any = loaded
        ) -> None:
            mine = [
                Piece(name=each.name, shape=each.shape, begin=each.begin, tensor=torch.full_like(each.tensor, 1))
                if "/up/" in each.name
                else whole(each.name, torch.full_like(state[each.name], 1))
                for each in pieces(state, rank, world)
            ]
            parent = restore_(fs, ROOT, lambda _: mine, report=pytest.fail, rank=rank, all_gather_text=all_gather_text)
            if parent is None:
                out = pieces(state, rank, world)
            else:
                loaded[rank] = {each.name: each.tensor for each in mine}
                out = [each if "/up/" in each.name else share(each, rank, world) for each in mine]
            with open_writer(
                fs,
                ROOT,
                keep=Keep(),
                parent=parent,
                rank=rank,
                world=world,
                all_gather_text=all_gather_text,
                chunk_bytes=chunk_bytes,
            ) as writer:
                writer.save(out, step=number, meta={"number": 3})

        assert on_ranks(world, attempt) == [None] * world
        manifest = entries(fs, ROOT)[0].manifest
        assert manifest is not None and len(manifest.files) == world
        digests.add(str({name: tensor.digest for name, tensor in manifest.tensors.items()}))
        if number > 1:
            for name, tensor in state.items():
                parts = [each[name].view(-1) for each in loaded]
                found = [torch.cat(parts)] if "/up/" in name else parts
                assert all(torch.equal(each, tensor.view(-1)) for each in found)
    assert len(digests) == 1
    assert number_in(fs) == 3


def test_a_part_is_loaded_alone(tmp_path: Path) -> None:
    """Weights for another run: other tensors are not read, those that are asked for are checked."""
    fs = MemoryFs()
    with open_writer(fs, ROOT, keep=Keep(), chunk_bytes=64) as writer:
        writer.save(pieces(values(1)), step=1, meta={"number": 1})
    manifest = manifest_in(fs)
    assert manifest is not None
    folder = ROOT / manifest.name()
    found = whole("param/gain/value", torch.zeros(7))
    load_(fs, folder, manifest, [found], partial=True)
    assert torch.equal(found.tensor, values(1)["param/gain/value"])
    with pytest.raises(InputError, match="expected nothing else, got 'param/up/first'"):
        load_(fs, folder, manifest, [found])
    with pytest.raises(InputError, match="expected 'x', got nothing"):
        load_(fs, folder, manifest, [whole("x", torch.zeros(7))], partial=True)


def test_no_folder_is_no_checkpoint_and_no_folder_is_made(tmp_path: Path) -> None:
    assert number_in(Disk(), tmp_path / "checkpoints") is None
    assert list(tmp_path.iterdir()) == []
    with open_writer(Disk(), tmp_path / "checkpoints", keep=Keep()):
        pass
    assert number_in(Disk(), tmp_path / "checkpoints") is None


def test_the_buffer_is_as_large_as_is_said() -> None:
    plan = shard.plan_shard(pieces(values(1)))
    assert shard.num_bytes(plan.pieces) == plan.size - len(plan.header) == 60 * (2 + 2 + 4) + 7 * 4 + 8
    assert all(
        offset % piece.tensor.element_size() == 0 for piece, offset in zip(plan.pieces, plan.offsets, strict=True)
    )
