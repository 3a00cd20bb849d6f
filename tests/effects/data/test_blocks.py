"""Blocks of shards: what a training reads at its start, what it verifies before it uses it, and who does."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.config.sections import Config
from nmoe.effects.data import corpus, inspect, tokenizer
from nmoe.effects.data.mixture import read_manifests
from nmoe.effects.data.store import blocks, shard_writer, shards
from nmoe.effects.parallel.launch import from_environment
from nmoe.effects.train import run
from nmoe.errors import InputError
from nmoe.pure.model.model import Batch
from tests.effects.data.test_data import patched
from tests.effects.parallel.rank_runs import as_world, train
from tests.effects.parallel.test_ranks import config_of, digests, lines

BLOCK = 256
"""Bytes of a block here: 128 tokens."""

HEADER = 128


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 tokens, and no more than those of 64 tokens read for the n-gram baselines."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(corpus, "NGRAM_TOKENS", 64)


def write(folder: Path, sources: Path, *, shard_tokens: int = 640, num_shards: int = 2) -> Path:
    """Shards of random documents of 63 tokens and an end of text."""
    drawn = np.random.default_rng(0).integers(0, 299, (shard_tokens * num_shards // 64, 63))
    known = tokenizer.load(sources)
    splits = {"train": iter(drawn), "validation": iter(drawn[:4])}
    shard_writer.write(folder, known, splits, tokens_per_shard=shard_tokens)
    return folder


def config(folder: Path, work: Path, name: str, steps: int = 8) -> Config:
    made = config_of(folder, work, name, steps=steps)
    return attrs.evolve(made, checkpoint=attrs.evolve(made.checkpoint, keep_last=steps))


@given(pieces=st.lists(st.binary(min_size=1, max_size=2 * BLOCK), min_size=1, max_size=6))
def test_digests_are_of_whole_blocks_however_the_bytes_come(pieces: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", BLOCK)
        hasher, content = blocks.Hasher(), b"".join(pieces)
        for piece in pieces:
            hasher.update(piece)
        parts = [content[begin : begin + BLOCK] for begin in range(0, len(content), BLOCK)]
        assert hasher.text() == "".join(hashlib.sha256(part).hexdigest() + "\n" for part in parts)
        assert len(hasher.text()) == blocks.LINE_BYTES * blocks.num_blocks(len(content))


def bytes_read() -> int:
    """By this process, by calls of the system."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_opening_reads_no_more_of_a_large_corpus(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen times the tokens in as many shards: 5.9 MB more, of which not one 64 KiB is read."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 15)
    monkeypatch.setattr(corpus, "NGRAM_TOKENS", 64)
    once, often = (write(tmp_path / str(times), sources, shard_tokens=times * 98_304) for times in (1, 16))
    launch, found = from_environment({}), list[int]()
    for folder in (once, once, often):  # what Python imports is read the first time
        begin = bytes_read()
        corpus.open_corpus(config(folder, tmp_path, "x"), launch)
        found.append(bytes_read() - begin)
    assert abs(found[2] - found[1]) < 1 << 16, found


@pytest.mark.usefixtures("small")
def test_each_block_is_verified_by_one_rank(tmp_path: Path, sources: Path) -> None:
    folder = write(tmp_path / "shards", sources, num_shards=5)
    (manifest,) = read_manifests([folder])
    owned = [shards.open_split(folder, manifest, "train", rank=rank - 7, world=3).blocks() for rank in range(3)]
    names = [each.path.name for of_rank in owned for each in of_rank]
    assert sorted(names) == [f"shard-{index:05d}.npy" for index in range(5)] and sorted(map(len, owned)) == [1, 2, 2]
    assert {each.count for of_rank in owned for each in of_rank} == {5}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("block", [0, 2, 4], ids=["first", "middle", "last"])
def test_a_block_is_verified_before_a_token_of_it_is_used(tmp_path: Path, sources: Path, block: int) -> None:
    """Tokens of other blocks of the shard are read; a thread comes upon it too."""
    folder = write(tmp_path / "shards", sources)
    patched("train/shard-00001.npy", HEADER + BLOCK * block + 77)(folder)
    (manifest,) = read_manifests([folder])
    wrong = (
        f"shard-00001.npy: expected block {block}, bytes {BLOCK * block} to {BLOCK * block + BLOCK} of the tokens, "
        r"with sha256 (\w{64}), got (?!\1)\w{64}; restore"
    )
    shard = shards.open_split(folder, manifest, "train").tokens[1]
    for other in {0, 1, 2, 3, 4} - {block}:
        assert len(shard[128 * other : 128 * other + 128]) == 128
    for part in (slice(128 * block, 128 * block + 1), slice(128 * block + 127, 128 * block + 128), slice(0, 640)):
        with pytest.raises(InputError, match=wrong):
            shard[part]
    with blocks.Verification(shards.open_split(folder, manifest, "train").blocks()) as verification:
        verification._thread.join(60)
    with pytest.raises(InputError, match=wrong):
        raise verification.problem or AssertionError
    trusting = shards.open_split(folder, manifest, "train", rank=0, world=2).tokens[1]
    assert len(trusting[:]) == 640


def first_use(folder: Path, work: Path) -> dict[int, int]:
    """By block of the second shard the first step whose batch holds a token of it, of a run on one rank."""
    steps: dict[int, int] = {}
    opened = corpus.open_corpus(config(folder, work, "x"), from_environment({}))
    known = next(each for each in opened.blocks if each.path.name == "shard-00001.npy" and each.count == 5)
    for step in range(8):
        opened.read(4 * step)
        steps |= {block: step for block in known._known if block not in steps}
    return steps


@pytest.mark.usefixtures("small")
def test_no_step_is_taken_on_a_bad_block(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the thread: found by the batch that needs it, although batches are read ahead."""
    monkeypatch.setattr(blocks.Verification, "_run", lambda self: None)
    folder = write(tmp_path / "shards", sources)
    block, step = max(first_use(folder, tmp_path).items(), key=lambda item: item[1])
    assert step >= 1
    patched("train/shard-00001.npy", HEADER + BLOCK * block)(folder)
    ((code, text),) = train(as_world(config(folder, tmp_path, "bad"), 1, experts=1), tmp_path / "out")
    assert code == 2 and text.count("nmoe: ") == 1, text
    assert f"shard-00001.npy: expected block {block}, bytes" in text
    assert lines(tmp_path / "runs" / "bad")[-1]["step"] == step


def held_until_verified(begun: threading.Event, read: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """The third step waits for the thread that verifies, and the thread for the third step: it is the last one."""

    def held(cursor: int) -> Batch:
        if cursor >= 8:
            begun.set()
            for thread in [each for each in threading.enumerate() if each.name == "verify shards"]:
                thread.join(60)
        return read(cursor)

    return held


def only_in_the_thread(begun: threading.Event, verify: Callable[..., None]) -> Callable[..., None]:
    """Nothing is verified by who uses it."""

    def verified(self: blocks.Blocks, first: int, last: int) -> None:
        if threading.current_thread().name == "verify shards":
            assert begun.wait(60)
            verify(self, first, last)

    return verified


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("block", [0, 2, 4], ids=["first", "middle", "last"])
def test_a_bad_block_ends_the_run_on_two_ranks_and_the_same_command_resumes(
    tmp_path: Path, sources: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank owns the shard; its thread alone looks. Restored, the run ends where an undisturbed one does."""
    folder = write(tmp_path / "shards", sources)
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    path = folder / "train" / "shard-00001.npy"
    content = path.read_bytes()
    patched("train/shard-00001.npy", HEADER + BLOCK * block + 5)(folder)
    begun = threading.Event()
    worlds = {rank: run.World(read=partial(held_until_verified, begun)) for rank in range(2)}
    bad = as_world(config(folder, tmp_path, "bad"), 2, experts=1)
    with monkeypatch.context() as patch:
        patch.setattr(blocks.Blocks, "verify", only_in_the_thread(begun, blocks.Blocks.verify))
        told = train(bad, tmp_path / "out", worlds)
    assert [code for code, _ in told] == [2, 2] and "nmoe: " not in told[1][1], told
    wrong = f"rank 1: {path}: expected block {block}, bytes {BLOCK * block} to {BLOCK * block + BLOCK} of the tokens, "
    assert told[0][1].count("nmoe: ") == 1 and wrong in told[0][1], told
    assert lines(tmp_path / "runs" / "bad")[-1]["step"] == 3
    path.write_bytes(content)
    assert [code for code, _ in train(bad, tmp_path / "out")] == [0, 0]
    good = as_world(config(whole, tmp_path, "good"), 2, experts=1)
    assert [code for code, _ in train(good, tmp_path / "out")] == [0, 0]
    assert digests(tmp_path / "runs" / "bad", 8) == digests(tmp_path / "runs" / "good", 8)


@pytest.mark.usefixtures("small")
def test_digests_are_written_for_a_folder_of_an_earlier_version(tmp_path: Path, sources: Path) -> None:
    folder, said = write(tmp_path / "shards", sources), list[str]()
    written = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in folder.rglob("*.blocks"):
        path.unlink()
    with pytest.raises(InputError) as caught:
        read_manifests([folder])
    assert len(caught.value.problems) == 2  # a line for each split, not for each shard
    assert all(line.endswith(f"write them: nmoe data digest {folder}") for line in caught.value.problems)
    path = folder / "train" / "shard-00001.npy"
    patched("train/shard-00001.npy", HEADER + 5)(folder)
    with pytest.raises(InputError, match="shard-00001.npy: expected content with sha256 .*, got .*; restore"):
        inspect.digest([folder], said.append)
    path.write_bytes(written[path])
    inspect.digest([folder], said.append)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == written
    assert said == [f"{folder}: digests of blocks beside 3 shards"]
    assert inspect.verify([folder], said.append) == 0
    patched("train/shard-00001.blocks", 3)(folder)
    with pytest.raises(InputError, match="shard-00001.blocks: expected the digests of the blocks of shard-00001.npy, "):
        inspect.verify([folder], said.append)
