"""The stream of a mixture: the same for any ranks, prefetch and resume; and what is said of bad sources."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from nmoe.config.data_mixture import load_mixture
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.loader import open_stream
from nmoe.effects.data.mixture import DataPlan, plan_folder, plan_mixture
from nmoe.effects.data.prefetch import prefetching
from nmoe.effects.data.store import shard_writer, shards
from nmoe.effects.data.store.format import read_manifest
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.data.order import stretch
from nmoe.pure.model.model import Batch

T = 16
KEY = Key(3).fold("data")
CPU = torch.device("cpu")
MIXTURE = """
[sources.books]
path = "books"
pretrain = 2.0
mid = 1.0
long = 0

[sources.code]
path = "code"
pretrain = 1.0
mid = 3.0
long = 1.0

[sources.never]
path = "never"
pretrain = 0
mid = 0
long = 0

[sources.small]
path = "small"
at_end = "stop"
pretrain = 1.0
mid = 0
long = 0

[flows.dev]
tokens = 26_000
pretrain = 0.6
mid = 0.3
long = 0.1
"""


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    texts = [f"line {index} of a text about {index % 7} things\n" * 3 for index in range(40)]
    return tokenizers.train(texts, 280, lambda text: None)


def documents(num_tokens: int, seed: int) -> list[np.ndarray]:
    """Documents of 1 to 40 tokens, with end of text `num_tokens` together."""
    generator = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while num_tokens:
        length = min(int(generator.integers(2, 42)), num_tokens)
        found.append(generator.integers(0, 256, length - 1))
        num_tokens -= length
    return found


SIZES = {"books": 6000, "code": 4000, "never": 1000, "small": 900}


@pytest.fixture
def folder(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> Path:
    """A mixture file and its sources, several shards each."""
    for seed, (name, size) in enumerate(SIZES.items()):
        splits = {"train": documents(size, seed), "validation": documents(100, seed + 100)}
        shard_writer.write(tmp_path / name, tokenizer, splits, tokens_per_shard=700)
    (tmp_path / "mix.toml").write_text(MIXTURE)
    return tmp_path


def planned(folder: Path) -> DataPlan:
    return plan_mixture(load_mixture(folder / "mix.toml"), "dev", sequence_length=T, active_parameters=0)


def reader(data: DataPlan, rank: int, world: int, batch_size: int = 24, microbatch_size: int = 1) -> Callable:
    splits = [
        shards.open_split(path, manifest, "train") for path, manifest in zip(data.folders, data.manifests, strict=True)
    ]
    sizes = {"batch_size": batch_size, "microbatch_size": microbatch_size, "sequence_length": T}
    return open_stream(splits, data.stream, rank=rank, world=world, key=KEY, end_of_text=279, **sizes)


def told(batches: Sequence[Batch]) -> bytes:
    """Every number of some batches, sequence by sequence."""
    digest = hashlib.sha256()
    for batch in batches:
        assert isinstance(batch.start, torch.Tensor)
        rows = (each.reshape(-1, T) for each in (batch.tokens, batch.targets, batch.start))
        for row in zip(*rows, strict=True):
            digest.update(b"".join(each.numpy().tobytes() for each in row))
    return digest.digest()


STEPS = 64


@pytest.mark.parametrize("depth", [0, 3])
def test_the_stream_is_the_same_for_any_ranks_and_prefetch(folder: Path, depth: int) -> None:
    """64 steps of 24 windows over three stages, also with the ranks changed on the way: 1, 2, 4, then 1 again."""
    data = planned(folder)
    whole = told([reader(data, 0, 1)(24 * step) for step in range(STEPS)])

    def read(world: Callable[[int], int]) -> bytes:
        batches: list[Batch] = []
        for step in range(STEPS):
            for rank in range(world(step)):
                batches.append(readers[world(step), rank](24 * step))
        return told(batches)

    worlds = (1, 2, 3, 4, 8)
    stacks = {
        (w, r): prefetching(reader(data, r, w), batch_size=24, depth=depth, device=CPU)
        for w in worlds
        for r in range(w)
    }
    readers = {place: stack.__enter__() for place, stack in stacks.items()}
    try:
        for count in worlds:
            assert read(lambda step, count=count: count) == whole
        assert read(lambda step: (1, 2, 4, 1)[step // 16]) == whole
    finally:
        for stack in stacks.values():
            stack.__exit__(None, None, None)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_resumed_stream_goes_on_where_it_was(folder: Path) -> None:
    """At each of 64 steps, with nothing but the cursor."""
    data = planned(folder)
    batches = [reader(data, 0, 1)(24 * step) for step in range(STEPS)]
    for step in range(STEPS):
        with prefetching(reader(data, 0, 1), batch_size=24, depth=2, device=CPU) as read:
            rest = [read(24 * at) for at in range(step, min(step + 3, STEPS))]
        assert told(rest) == told(batches[step : step + 3])


def test_the_stream_holds_what_the_plan_says(folder: Path) -> None:
    """Every window is one of its source's, as often as planned, and targets are what comes next."""
    data = planned(folder)
    windows: dict[bytes, str] = {}
    for path, manifest in zip(data.folders, data.manifests, strict=True):
        split = shards.open_split(path, manifest, "train")
        for window in range((manifest.splits["train"].tokens - 1) // T):
            windows[stretch(split.tokens, window * T, T + 1).astype(np.int64).tobytes()] = f"{path.name} {window}"
    total = data.stream.windows()
    assert total == 26_000 // T
    read = reader(data, 0, 1, batch_size=1)
    found = [read(at) for at in range(total)]
    names = [
        windows[torch.cat([batch.tokens.flatten(), batch.targets.flatten()[-1:]]).numpy().tobytes()] for batch in found
    ]
    begin = 0
    for stage, share in zip(data.stream.stages, (0.6, 0.3, 0.1), strict=True):
        assert abs(sum(stage.quotas) - share * total) < 1
        part = [name.split()[0] for name in names[begin : begin + sum(stage.quotas)]]
        assert [part.count(name) for name in SIZES] == list(stage.quotas)
        begin += sum(stage.quotas)
    counts = [names.count(name) for name in set(names)]
    by_source = {source: [n for n in set(names) if n.startswith(source)] for source in SIZES}
    assert not by_source["never"]
    assert len(by_source["small"]) == 899 // T == names.count("small 0") * (899 // T)  # each once: it stops
    assert len(by_source["books"]) == 5999 // T and len(by_source["code"]) == 3999 // T
    for source in ("books", "code"):  # whole passes before a window repeats again
        seen = [names.count(name) for name in by_source[source]]
        assert max(seen) - min(seen) <= 1
    assert sum(counts) == total


def test_a_source_that_may_not_repeat_enough_is_an_error(folder: Path) -> None:
    text = MIXTURE.replace('path = "code"', 'path = "code"\nmax_passes = 1.5')
    (folder / "mix.toml").write_text(text)
    with pytest.raises(
        InputError, match="stage long: expected sources that hold its 163 windows .* got 0; lower the tokens"
    ):
        planned(folder)


def test_nothing_is_read_after_the_end(folder: Path) -> None:
    data = planned(folder)
    total = data.stream.windows()
    read = reader(data, 0, 1, batch_size=2)
    read(total - 2)
    with pytest.raises(InputError, match=f"a stream of {total + 1} windows, got {total}; lower train.steps"):
        read(total - 1)
    with prefetching(read, batch_size=2, depth=4, device=CPU) as ahead:
        ahead(total - 2)  # what was read ahead and failed was not asked for


def test_a_flipped_bit_stops_the_run_before_a_token_of_the_shard_is_used(folder: Path) -> None:
    data = planned(folder)
    path = folder / "code" / "train" / "shard-00002.npy"
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)
    read = reader(data, 0, 1)
    with prefetching(read, batch_size=24, depth=2, device=CPU) as ahead:
        with pytest.raises(InputError, match="shard-00002.npy: expected block 0, bytes 0 to 1376 of the tokens, with"):
            for step in range(STEPS):
                batch = ahead(24 * step)
                assert batch.tokens.shape == (24, 1, T)


def test_what_fails_in_the_thread_is_raised_by_the_call_for_it() -> None:
    def read(cursor: int) -> Batch:
        if cursor == 6:
            raise OSError("disk gone")
        return Batch(torch.tensor([cursor]), torch.tensor([threading.get_ident()]), ())

    with prefetching(read, batch_size=2, depth=3, device=CPU) as ahead:
        batches = [ahead(0), ahead(2), ahead(4)]
        assert [int(batch.tokens) for batch in batches] == [0, 2, 4]
        assert all(int(batch.targets) != threading.get_ident() for batch in batches)
        with pytest.raises(OSError, match="disk gone"):
            ahead(6)
        assert int(ahead(8).tokens) == 8
        assert int(ahead(2).tokens) == 2  # another cursor than expected


def test_another_tokenizer_is_named(folder: Path) -> None:
    other = tokenizers.train(["another text with other words\n" * 9, "and more of it\n" * 5], 270, lambda text: None)
    for path in sorted((folder / "code").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    shard_writer.write(folder / "code", other, {"train": documents(500, 1), "validation": documents(90, 2)})
    first = read_manifest(folder / "books").tokenizer_identity[:12]
    with pytest.raises(InputError, match=f"code: expected the tok.* of .*books, {first}, got {other.identity[:12]}; "):
        planned(folder)


def test_missing_and_superfluous_shards_are_all_named(folder: Path) -> None:
    (folder / "books" / "train" / "shard-00001.npy").unlink()
    (folder / "code" / "train" / "shard-00099.npy").write_bytes(b"x")
    with open(folder / "small" / "train" / "shard-00000.npy", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError) as caught:
        planned(folder)
    assert [problem.split(": ")[0].split("/")[-3:] for problem in caught.value.problems] == [
        ["books", "train", "shard-00001.npy"],
        ["code", "train", "shard-00099.npy"],
        ["small", "train", "shard-00000.npy"],
    ]


def test_an_id_beyond_the_vocabulary_is_found_when_the_shard_is_read(folder: Path) -> None:
    """With digests that fit: somebody wrote it so."""
    manifest = json.loads((folder / "code" / "manifest.json").read_text())
    path = folder / "code" / "train" / "shard-00000.npy"
    content = bytearray(path.read_bytes())
    content[128:130] = (5000).to_bytes(2, "little")
    path.write_bytes(content)
    receipt = manifest["splits"]["train"]["shards"][0]
    receipt["sha256"] = hashlib.sha256(content[128:]).hexdigest()
    path.with_suffix(".blocks").write_text(receipt["sha256"] + "\n")
    (folder / "code" / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (folder / "code" / "train" / "shard-00000.json").write_text(json.dumps(receipt, indent=1) + "\n")
    split = shards.open_split(folder / "code", read_manifest(folder / "code"), "train")
    with pytest.raises(InputError, match="shard-00000.npy: expected ids below the tokenizer's 280, got 5000"):
        split.tokens[0][:1]


def test_documents_of_one_source_are_told_apart_by_end_of_text(folder: Path) -> None:
    data = plan_folder(folder / "books", sequence_length=T, windows=4)
    splits = [shards.open_split(folder / "books", data.manifests[0], "train")]
    sizes: dict[str, Any] = {"batch_size": 4, "microbatch_size": 2, "sequence_length": T, "rank": 0, "world": 1}
    sizes["key"] = KEY
    plain = open_stream(splits, data.stream, **sizes)(0)
    masked = open_stream(splits, data.stream, end_of_text=279, **sizes)(0)
    assert plain.start == () and isinstance(masked.start, torch.Tensor)
    assert torch.equal(plain.tokens, masked.tokens) and masked.start.dtype == torch.int32
    for tokens, starts in zip(masked.tokens.reshape(-1, T).tolist(), masked.start.reshape(-1, T).tolist(), strict=True):
        for index, begin in enumerate(starts):
            assert begin == max((at + 1 for at in range(index) if tokens[at] == 279), default=0)


WRONG = (
    ("tokens = 26_000", "tokens = 26_000\ntokens_per_parameter = 2.0", "flows.dev: expected one of tokens and "),
    ("tokens = 26_000", "", "flows.dev: expected one of tokens and tokens_per_parameter, got none"),
    ("tokens = 26_000", "tokens = 0", "flows.dev.tokens: expected at least 1, got 0"),
    ("pretrain = 0.6\nmid = 0.3\nlong = 0.1", "pretrain = 0", "flows.dev: expected a stage of weight above 0"),
    ('at_end = "stop"', 'at_end = "wrap"', 'sources.small.at_end: expected one of "repeat", "stop", got "wrap"'),
    (
        'at_end = "stop"',
        'at_end = "stop"\nmax_passes = 2.0',
        "sources.small.max_passes: expected at most 1 when",
    ),
    ("mid = 3.0\n", "", "sources.code.mid: expected a weight for every source or for none"),
    ("mid = 3.0\n", "mid = -3.0\n", "sources.code.mid: expected at least 0, got -3.0"),
    ("[sources.small]", '[sources.""]', 'sources: expected a name for every source, got "";'),
    ('path = "code"', 'paht = "code"', "sources.code.paht: expected a known key"),
)


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_a_wrong_mixture_file_is_told_by_file_line_and_key(folder: Path, old: str, new: str, message: str) -> None:
    assert old in MIXTURE
    (folder / "mix.toml").write_text(MIXTURE.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_mixture(folder / "mix.toml")
    assert any(message in problem and f"{folder}/mix.toml:" in problem for problem in caught.value.problems)


def test_a_flow_that_is_not_there_and_sources_that_are_not(folder: Path) -> None:
    mixture = load_mixture(folder / "mix.toml")
    with pytest.raises(InputError, match="expected one of the flows dev of .*, got proxy; choose one"):
        plan_mixture(mixture, "proxy", sequence_length=T, active_parameters=0)
    (folder / "mix.toml").write_text("[flows.dev]\ntokens = 5\n")
    with pytest.raises(InputError, match="sources: expected a table a source, got a table; write"):
        load_mixture(folder / "mix.toml")


def test_tokens_a_parameter_temperature_and_share(folder: Path) -> None:
    text = (
        '[sources.books]\npath = "books"\n[sources.code]\npath = "code"\n'
        "[stages.pretrain]\ntemperature = 2.0\nmax_share = 0.52\n[flows.proxy]\ntokens_per_parameter = 20\n"
    )
    (folder / "mix.toml").write_text(text)

    def quotas(words: str = "") -> tuple[int, ...]:
        (folder / "mix.toml").write_text(text.replace("max_share = 0.52", words))
        mixture = load_mixture(folder / "mix.toml")
        stream = plan_mixture(mixture, "proxy", sequence_length=T, active_parameters=8_000).stream
        assert stream.windows() == 160_000 // T
        return stream.stages[0].quotas

    # weights are the tokens of the sources, 6000 and 4000; their roots are as 1.2247 to 1
    assert quotas() == (5505, 4495)
    assert quotas("max_share = 0.52") == (5200, 4800)
    with pytest.raises(InputError, match="sources that hold its 10000 windows .*, got 8000; "):
        quotas("max_share = 0.4")


def test_the_plan_changes_with_what_it_reads_and_not_with_where_it_lies(folder: Path) -> None:
    from nmoe.pure.data.stages import identity

    first = identity(planned(folder).stream)
    moved = folder / "elsewhere"
    moved.mkdir()
    for name in (*SIZES, "mix.toml"):
        (folder / name).rename(moved / name)
    assert identity(planned(moved).stream) == first
    (moved / "mix.toml").write_text(MIXTURE.replace("mid = 3.0", "mid = 2.0"))
    assert identity(planned(moved).stream) != first
    changed = planned(moved)
    other = attrs.evolve(changed.stream.ingredients[0], content="0" * 64)
    assert identity(attrs.evolve(changed.stream, ingredients=(other, *changed.stream.ingredients[1:]))) != identity(
        changed.stream
    )
