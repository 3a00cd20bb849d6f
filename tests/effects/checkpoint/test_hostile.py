"""What strangers send: manifests and weights changed at random, with every digest made right again.

So the parser behind the digest is reached. A changed file is refused in one sentence that names it, or it is read as
what it says; nothing else.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader, verbs, weights
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.writer import open_writer, prune
from nmoe.effects.record.names import WEIGHTS
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import whole
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.model.blueprint import make_blueprint
from tests.effects.checkpoint.saves import manifest_in, number_in, pieces, values
from tests.effects.train.tiny import tiny

SECONDS = 10  # of the processor: what is read without a bound takes minutes
GROWTH_MB = 200
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 1 << 31, 1 << 62, 1 << 63, 1 << 200, -(1 << 63), 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "x", "..", "../x", "a/b", "\x00", "\x1b[2J", "\ud800", "é", "F32", "U8", "BOOL", "9" * 5000),
    *([], [[]], [0], [1 << 62, 0], [1 << 62, 1 << 62], [-1, -1], {}, {"a": 1}, "updates", "param/up/value"),
)
counts = pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.long)])


def change(value: Any, chance: random.Random) -> Any:
    """Change one place of a JSON value: replaced, deleted, doubled, renamed, or exchanged with another."""
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        inner = stack.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            places.append((inner, key))
            stack.append(inner[key])
    inner, key = chance.choice(places)
    how = chance.randrange(6)
    if how == 0:
        del inner[key]
    elif how == 1 and isinstance(inner, list):
        inner.insert(key, json.loads(json.dumps(inner[key])))
    elif how == 1:
        inner[str(chance.choice(STRANGE))] = inner[key]
    elif how == 2:
        other, place = chance.choice(places)
        inner[key] = json.loads(json.dumps(other[place]))
    elif how == 3 and isinstance(inner[key], int):
        inner[key] += chance.choice((-1, 1, -8, 8, 1 << 32))
    elif how == 4 and isinstance(inner[key], str) and inner[key]:
        at = chance.randrange(len(inner[key]))
        inner[key] = inner[key][:at] + chance.choice("\x00é/0fé\ud800\n") + inner[key][at + 1 :]
    else:
        inner[key] = chance.choice(STRANGE)
    return value


def signed(line: bytes) -> bytes:
    """The content of a manifest's file with this line in it."""
    return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"


def dumped(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@contextmanager
def bounded() -> Iterator[None]:
    """The block takes neither long nor much memory."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_MB << 10


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of numbers 1 and 2, the newer one written by one rank and with a score and a parent."""
    root = tmp_path / "checkpoints"
    for number in (1, 2):
        parent = manifest_in(Disk(), root)
        with open_writer(Disk(), root, keep=Keep(last=9), parent=parent, chunk_bytes=1024) as writer:
            writer.save(pieces(values(number)), step=number, meta={"number": number, "nested": {"a": [1]}}, score=1.5)
    return root


def refused(act: Callable[[], object], *names: str) -> bool:
    """Whether `act` raises what a user can read; another exception is a fault."""
    try:
        act()
    except InputError as error:
        assert all(any(name in problem for name in names) for problem in error.problems), error.problems
        assert all(problem.isprintable() and len(problem) < 2000 for problem in error.problems), error.problems
        return True
    return False


@counts
def test_a_changed_manifest_is_refused_or_means_what_it_says(root: Path, count: int) -> None:
    """Read, listed, verified and restored; the older one is what is restored, never a wrong state."""
    chance = random.Random(count)
    path = max(root.glob("step-*")) / manifests.FILE
    line = path.read_bytes().partition(b"\n")[0]
    taken = 0
    for _ in range(count):
        fields = json.loads(line)
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            change(fields, chance)
        if chance.randrange(10) == 0:  # what is derived is made right too, so that the checks behind it are reached
            files = fields.get("files")
            for file in files if isinstance(files, list) else ():
                if isinstance(file, dict) and isinstance(file.get("chunks"), list):
                    file["sha256"] = hashlib.sha256(
                        "".join(map(str, file["chunks"])).encode("utf-8", "replace")
                    ).hexdigest()
        path.write_bytes(signed(dumped(fields)))
        with bounded():
            if not refused(lambda: manifests.read(Disk(), path.parent), str(root)):
                manifest = manifests.read(Disk(), path.parent)
                taken += not reader.verify(Disk(), path.parent, manifest)
        if chance.randrange(20) == 0:
            said: list[str] = []
            with bounded():
                refused(lambda said=said: _restored(root, said), str(root))
            assert all(problem.isprintable() for problem in said)
    print(f"{count} manifests, {taken} whole all the same")
    assert taken < count / 2


def _restored(root: Path, said: list[str]) -> None:
    """Restore; the tensors are those of a number that was saved, whatever the manifest says the number is."""
    found = {name: torch.full_like(tensor, 3) for name, tensor in values(0).items()}
    if reader.restore_(Disk(), root, lambda _: [whole(*each) for each in found.items()], report=said.append):
        assert int(found["updates"]) in (1, 2)
        wanted = values(int(found["updates"]))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 100_000,
        b'{"format":1,"meta":' + b'{"a":' * 900 + b"1" + b"}" * 901,
        b"9" * 100_000,
        b"NaN",
        b'"\\ud800"',
        b"\xff",
        b"",
    ],
    ids=["lists", "objects", "open", "nested meta", "digits", "NaN", "surrogate", "no UTF-8", "empty"],
)
def test_a_line_that_no_parser_likes_is_damage(root: Path, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = max(root.glob("step-*")) / manifests.FILE
    path.write_bytes(signed(line))
    with pytest.raises(InputError, match=str(path)):
        manifests.read(Disk(), path.parent)
    said: list[str] = []
    assert number_in(Disk(), root, said.append) == 1 and said
    assert verbs.list_checkpoints(root) == 0 and "damaged" in capsys.readouterr().out
    assert prune(Disk(), root, Keep(last=1)) == () and path.exists(), "what is damaged is not counted and not deleted"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", "\x1b[2J", 1 << 70, [[[]]]], ids=repr)
def test_strange_values_in_what_a_training_says_of_itself(root: Path, value: Any, capsys: Any) -> None:
    path = max(root.glob("step-*")) / manifests.FILE
    fields = json.loads(path.read_bytes().partition(b"\n")[0])
    fields["meta"]["strange"] = value
    path.write_bytes(signed(dumped(fields)))
    if isinstance(value, float):
        with pytest.raises(InputError, match="expected "):
            manifests.read(Disk(), path.parent)
        return
    assert verbs.show(path.parent) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines()), shown


def test_a_chunk_of_any_size_is_not_read_at_once(root: Path) -> None:
    """A file as one chunk would be read into memory whole."""
    path = max(root.glob("step-*")) / manifests.FILE
    fields = json.loads(path.read_bytes().partition(b"\n")[0])
    (file,) = fields["files"]
    content = (path.parent / file["name"]).read_bytes()
    file.update(chunk_bytes=1 << 40, chunks=[hashlib.sha256(content).hexdigest()])
    file["sha256"] = manifests.root_digest(file["chunks"])
    path.write_bytes(signed(dumped(fields)))
    with pytest.raises(InputError, match="expected chunks of 1 to "):
        manifests.read(Disk(), path.parent)


@pytest.fixture(scope="module")
def made() -> tuple[Blueprint, dict[str, torch.Tensor]]:
    """A model, and weights for it."""
    blueprint = make_blueprint(tiny(compute="bf16", vocab_size=304))
    draw = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=draw).to(manifests.DTYPES[dtype])
        for name, (dtype, shape) in weights.formats(blueprint).items()
    }
    return blueprint, tensors


@pytest.fixture
def folder(made: tuple[Blueprint, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    save_file(made[1], tmp_path / WEIGHTS)
    return tmp_path


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "fp32 for bf16": lambda t: t.update(embed=t["embed"].float()),
    "fp16 for bf16": lambda t: t.update(embed=t["embed"].half()),
    "whole numbers": lambda t: t.update(embed=t["embed"].short()),
    "bf16 for fp32": lambda t: t.update({"blocks.1.ffn.router": t["blocks.1.ffn.router"].bfloat16()}),
    "router bias in bf16": lambda t: t.update(router_bias=t["router_bias"].bfloat16()),
    "router bias of one element": lambda t: t.update(router_bias=t["router_bias"][:1, :1].clone()),
    "router bias flat": lambda t: t.update(router_bias=t["router_bias"].flatten()),
    "no router bias": lambda t: t.pop("router_bias"),
    "one too many": lambda t: t.update(x=torch.zeros(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_are_refused(made: tuple[Blueprint, dict[str, torch.Tensor]], folder: Path, name: str) -> None:
    blueprint, tensors = made
    weights.load(folder, blueprint)
    CHANGES[name](other := dict(tensors))
    save_file(other, folder / WEIGHTS)
    for load in (lambda: weights.load(folder, blueprint), lambda: weights.of_path(Disk(), folder, blueprint)):
        assert refused(load, str(folder / WEIGHTS))


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_other_weights_is_refused(
    made: tuple[Blueprint, dict[str, torch.Tensor]], tmp_path: Path, name: str
) -> None:
    blueprint, tensors = made
    for changes, ok in ((None, True), (CHANGES[name], False)):
        other = dict(tensors)
        if changes is not None:
            changes(other)
        low = {
            f"{key}/remainder": torch.zeros_like(value, dtype=torch.int16)
            for key, value in tensors.items()
            if value.dtype is torch.bfloat16
        }
        named = {key if key == "router_bias" else f"param/{key}/value": value for key, value in other.items()}
        named |= {f"param/{key}": value for key, value in low.items()}
        root = tmp_path / str(ok) / "checkpoints"
        root.parent.mkdir()
        with open_writer(Disk(), root, keep=Keep()) as writer:
            writer.save([whole(key, value) for key, value in named.items()], step=1, meta={})
        assert refused(lambda root=root: weights.of_path(Disk(), root.parent, blueprint), str(root)) is not ok


@counts
def test_a_changed_header_of_weights_is_refused_or_means_what_it_says(
    made: tuple[Blueprint, dict[str, torch.Tensor]], folder: Path, count: int
) -> None:
    blueprint, tensors = made
    chance = random.Random(count)
    content = (folder / WEIGHTS).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:length]), content[length:]
    taken = 0
    for _ in range(count):
        how = chance.randrange(8)
        if how == 0:  # bytes of the header or its length, as they come
            changed = bytearray(content)
            for _ in range(chance.choice((1, 2, 8))):
                changed[chance.randrange(chance.choice((8, length)))] = chance.randrange(256)
        elif how == 1:
            changed = content[: chance.randrange(len(content))]
        else:
            fields = json.loads(json.dumps(header))
            for _ in range(chance.choice((1, 1, 2, 5))):
                change(fields, chance)
            text = dumped(fields)
            changed = len(text).to_bytes(8, "little") + text + data
        (folder / WEIGHTS).write_bytes(changed)
        with bounded():
            if not refused(lambda: weights.load(folder, blueprint), str(folder / WEIGHTS)):
                params, bias = weights.load(folder, blueprint)
                kinds = {name: (leaf.dtype, leaf.shape) for name, leaf in tree.leaves(params)}
                assert kinds | {"router_bias": (bias.dtype, bias.shape)} == {
                    name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
                }
                taken += 1
    print(f"{count} headers, {taken} fit all the same")
    assert taken < count / 2
