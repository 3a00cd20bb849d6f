"""Batches: exactly the source's windows, the same stream for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import attrs
import numpy as np
import pytest
import torch

from nmoe.effects.data.loader import held_out, open_stream
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.data.stages import single_source

T = 8
KEY = Key(3).fold("data")


@attrs.frozen(kw_only=True, eq=False)
class Tokens:
    """A split in memory."""

    where: str = "corpus/train"
    tokens: tuple[np.ndarray, ...]
    num_tokens: int


def source(num_tokens: int) -> Tokens:
    """Tokens 0, 1, 2 … in three arrays of uneven length: a token is its own position."""
    whole = np.arange(num_tokens, dtype="<u2")
    return Tokens(tokens=tuple(np.split(whole, [num_tokens // 5, num_tokens // 2])), num_tokens=num_tokens)


def reader(split: Tokens, batch_size: int, microbatch_size: int, rank: int = 0, world: int = 1) -> Callable:
    """The stream of a source that stands alone, a thousand windows long."""
    stream = single_source((split.num_tokens - 1) // T, 1000, content="")
    sizes = {"batch_size": batch_size, "microbatch_size": microbatch_size, "sequence_length": T}
    return open_stream([split], stream, rank=rank, world=world, key=KEY, **sizes)


def streamed(split: Tokens, world: int, *, steps: int, batch_size: int = 16, microbatch_size: int = 2) -> bytes:
    """SHA-256 of `steps` global batches, ranks laid side by side."""
    readers = [reader(split, batch_size, microbatch_size, rank, world) for rank in range(world)]
    digest = hashlib.sha256()
    for step in range(steps):
        for read in readers:
            batch = read(step * batch_size)
            share = batch_size // world // microbatch_size
            assert batch.tokens.shape == batch.targets.shape == (share, microbatch_size, T)
            for tokens, targets in zip(batch.tokens.reshape(-1, T), batch.targets.reshape(-1, T), strict=True):
                digest.update(tokens.numpy().tobytes() + targets.numpy().tobytes())
    return digest.digest()


def test_all_world_sizes_read_the_same_stream() -> None:
    """61 windows and batches of 16: the third step is cut by the end of an epoch."""
    split = source(61 * T + 5)
    streams = {streamed(split, world, steps=9) for world in (1, 2, 4, 8)}
    assert len(streams) == 1
    assert streams == {streamed(split, 1, steps=9, microbatch_size=16)}
    assert streams != {streamed(split, 1, steps=8)}


def test_the_cursor_is_all_there_is_to_resume_from() -> None:
    split = source(400)
    first, second, both = reader(split, 4, 2)(20), reader(split, 4, 2)(24), reader(split, 8, 2)(20)
    assert torch.equal(torch.cat([first.tokens, second.tokens]), both.tokens)
    assert not torch.equal(first.tokens, second.tokens)


def test_one_epoch_reads_every_window_of_the_source_once() -> None:
    split = source(30 * T + 1)
    batch = reader(split, 30, 10)(0)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, batch.tokens + 1)
    rows = batch.tokens.reshape(-1, T)
    assert not torch.equal(rows.flatten(), torch.arange(30 * T))
    assert torch.equal(rows[rows[:, 0].argsort()].flatten(), torch.arange(30 * T))


@pytest.mark.parametrize(("num_tokens", "fits"), [(T, False), (T + 1, True)])
def test_a_source_needs_one_window_and_the_target_of_its_last_token(num_tokens: int, fits: bool) -> None:
    split = source(num_tokens)
    sizes = {"microbatch_size": 1, "sequence_length": T, "rank": 0, "world": 1}
    if fits:
        assert reader(split, 2, 1)(5).targets[1, 0, -1] == T
        assert held_out(split, num_tokens=1, **sizes)[0].targets[0, -1] == T
    else:
        with pytest.raises(InputError, match=f"corpus/train: expected at least {T + 1} tokens, one window, got {T}; "):
            held_out(split, num_tokens=100, **sizes)


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(InputError, match="train.batch_size: expected a multiple of .* = 2 x 4, got 12; "):
        reader(source(30), 12, 4, rank=0, world=2)


def test_the_order_of_a_source_that_stands_alone_is_that_of_the_plain_key() -> None:
    """The literal windows: a checkpoint holds a position in this order; another order repeats and skips windows."""
    split = source(61 * T + 5)
    batch = reader(split, 16, 2)(7 * 16)
    first = batch.tokens.reshape(-1, T)[:, 0] // T
    assert first.tolist() == [18, 26, 58, 1, 52, 13, 17, 48, 43, 25, 47, 20, 6, 56, 4, 44]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1), (5 * T - 1, 4), (5 * T, 5), (10**6, 11)])
def test_ranks_share_the_first_windows_of_held_out_text(num_tokens: int, expected: int, world: int) -> None:
    split = source(11 * T + 3)
    parts = [
        held_out(split, num_tokens=num_tokens, microbatch_size=2, sequence_length=T, rank=rank, world=world)
        for rank in range(world)
    ]
    batches = [batch for part in parts for batch in part]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]).flatten(), torch.arange(expected * T))
    assert torch.equal(torch.cat([batch.targets for batch in batches]).flatten(), torch.arange(1, expected * T + 1))
    for part in parts:
        assert all(len(batch.tokens) == 2 for batch in part[:-1])
    held = [sum(len(batch.tokens) for batch in part) for part in parts]
    assert max(held) - min(held) <= 1
