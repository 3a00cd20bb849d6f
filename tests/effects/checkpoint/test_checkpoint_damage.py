"""No damage to a checkpoint goes unseen, and none makes a run start from nothing."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.manifest import Manifest
from nmoe.effects.checkpoint.reader import entries, load_, restore_, verify
from nmoe.effects.checkpoint.writer import open_writer
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import whole
from nmoe.pure.checkpoint.retention import Keep
from tests.effects.checkpoint.memory_fs import MemoryFs
from tests.effects.checkpoint.saves import ROOT, manifest_in, number_in, on_ranks, pieces, values


def saved(*numbers: int, world: int = 1, chunk_bytes: int = 1024) -> MemoryFs:
    """A folder with a checkpoint a number."""
    fs = MemoryFs()

    def attempt(rank, all_gather_text) -> None:
        with open_writer(
            fs,
            ROOT,
            keep=Keep(last=9),
            rank=rank,
            world=world,
            all_gather_text=all_gather_text,
            chunk_bytes=chunk_bytes,
        ) as writer:
            for number in numbers:
                writer.save(pieces(values(number), rank, world), step=number, meta={"number": number})

    assert on_ranks(world, attempt) == [None] * world
    return fs


def files(fs: MemoryFs) -> list[Path]:
    """Every file of every checkpoint."""
    return [ROOT / name / file for name in fs.names(ROOT) if name != "LEASE" for file in fs.names(ROOT / name)]


def newest(fs: MemoryFs) -> Path:
    return ROOT / entries(fs, ROOT)[0].name


def detected(fs: MemoryFs) -> bool:
    """Whether the only checkpoint is refused, with words that name its folder."""
    try:
        number_in(fs)
    except InputError as error:
        return all(str(ROOT) in problem for problem in error.problems)
    return False


def flips(fs: MemoryFs, places: Iterator[tuple[Path, int]]) -> tuple[int, list[tuple[Path, int]]]:
    """Flip one bit after the other, each alone: how many, and those that nothing noticed."""
    count, unseen = 0, []
    for path, bit in places:
        content = fs.content(path)
        content[bit // 8] ^= 1 << bit % 8
        if not detected(fs):
            unseen.append((path, bit))
        content[bit // 8] ^= 1 << bit % 8
        count += 1
    return count, unseen


def header_bits(fs: MemoryFs, every: int) -> Iterator[tuple[Path, int]]:
    """Each bit of what stands before the tensors in each file: length, text and what fills it up."""
    for path in files(fs):
        if path.suffix == ".safetensors":
            length = 8 + int.from_bytes(fs.content(path)[:8], "little")
            yield from ((path, bit) for bit in range(0, 8 * length, every))


def sampled_bits(fs: MemoryFs, count: int) -> Iterator[tuple[Path, int]]:
    """Bits anywhere, manifest included, as often as a file is long."""
    draw = random.Random(5)
    found = files(fs)
    sizes = [len(fs.content(path)) for path in found]
    for _ in range(count):
        path = draw.choices(found, sizes)[0]
        yield path, draw.randrange(8 * len(fs.content(path)))


def test_flipped_bits_are_seen() -> None:
    fs = saved(1, world=2)
    count, unseen = flips(fs, header_bits(fs, 331))
    assert unseen == [] and count > 150
    count, unseen = flips(fs, sampled_bits(fs, 150))
    assert unseen == []
    assert number_in(fs) == 1


@pytest.mark.long
def test_every_flipped_bit_of_a_header_is_seen() -> None:
    fs = saved(1, world=2)
    count, unseen = flips(fs, header_bits(fs, 1))
    assert unseen == [] and count >= 2 * 8 * 4096


@pytest.mark.long
def test_two_thousand_flipped_bits_are_seen() -> None:
    fs = saved(1, world=2)
    count, unseen = flips(fs, sampled_bits(fs, 2000))
    assert unseen == [] and count == 2000


def test_every_flipped_bit_of_a_tensor_is_seen() -> None:
    fs = saved(1, chunk_bytes=1 << 20)
    file = next(path for path in files(fs) if path.suffix == ".safetensors")
    start = 8 + int.from_bytes(fs.content(file)[:8], "little")
    bits = range(8 * start, 8 * len(fs.content(file)), 17)
    assert flips(fs, ((file, bit) for bit in bits))[1] == []


def test_every_length_of_a_cut_manifest_is_seen() -> None:
    fs = saved(1)
    path = newest(fs) / manifests.FILE
    content = bytes(fs.content(path))
    for length in range(len(content)):
        fs.content(path)[:] = content[:length]
        with pytest.raises(InputError, match="digest"):
            manifests.read(fs, path.parent)
    fs.content(path)[:] = content + b" "
    assert detected(fs)
    fs.content(path)[:] = content
    assert number_in(fs) == 1


def test_every_length_of_a_cut_file_is_seen() -> None:
    fs = saved(1)
    path = next(path for path in files(fs) if path.suffix == ".safetensors")
    content = bytes(fs.content(path))
    for length in [*range(0, len(content), 37), len(content) - 1]:
        fs.content(path)[:] = content[:length]
        assert detected(fs), length
    fs.content(path)[:] = content + b"\0"
    assert detected(fs)


def swap_files(fs: MemoryFs) -> None:
    """The two ranks' files change places."""
    first, second = (newest(fs) / f"rank-00{rank}.safetensors" for rank in (0, 1))
    fs.content(first)[:], fs.content(second)[:] = bytes(fs.content(second)), bytes(fs.content(first))


def foreign_file(fs: MemoryFs) -> None:
    """A whole file of another checkpoint of the same sizes."""
    path = newest(fs) / "rank-000.safetensors"
    older = ROOT / fs.names(ROOT)[1] / path.name
    assert older != path and len(fs.content(older)) == len(fs.content(path))
    fs.content(path)[:] = bytes(fs.content(older))


def foreign_manifest(fs: MemoryFs) -> None:
    """The manifest of another checkpoint."""
    path = newest(fs) / manifests.FILE
    fs.content(path)[:] = bytes(fs.content(ROOT / fs.names(ROOT)[1] / manifests.FILE))


def missing_file(fs: MemoryFs) -> None:
    fs.remove(newest(fs) / "rank-001.safetensors")


def missing_manifest(fs: MemoryFs) -> None:
    fs.remove(newest(fs) / manifests.FILE)


def renamed_file(fs: MemoryFs) -> None:
    folder = fs.folder(newest(fs))
    folder["rank-002.safetensors"] = folder.pop("rank-001.safetensors")


def renamed_folder(fs: MemoryFs) -> None:
    """As somebody does who wants to keep it."""
    fs.folder(ROOT)["good-one"] = fs.folder(ROOT).pop(newest(fs).name)


def promoted_folder(fs: MemoryFs) -> None:
    """An older one under a newer name."""
    fs.rename(newest(fs), ROOT / manifests.folder_name(9, 9, 9))


DAMAGES = (
    swap_files,
    foreign_file,
    foreign_manifest,
    missing_file,
    missing_manifest,
    renamed_file,
    renamed_folder,
    promoted_folder,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage: Callable[[MemoryFs], None]) -> None:
    fs = saved(1, 2, world=2)
    damage(fs)
    said: list[str] = []
    assert number_in(fs, report=said.append) == 1
    assert said and all(str(ROOT) in problem and "; " in problem for problem in said)


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if "foreign" not in damage.__name__])
def test_no_run_starts_from_nothing_beside_a_damaged_checkpoint(damage: Callable[[MemoryFs], None]) -> None:
    fs = saved(1, world=2)
    damage(fs)
    assert detected(fs)


def edited(fs: MemoryFs, change: Callable[[dict[str, Any]], object], spell: Callable[[Any], str] | None = None) -> None:
    """The newest manifest with a change, and with the digest that then is right."""
    content = fs.content(newest(fs) / manifests.FILE)
    fields = json.loads(content.partition(b"\n")[0])
    change(fields)
    spelled = spell or (lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")))
    line = spelled(fields).encode()
    content[:] = line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"


def chunk(fields: dict[str, Any]) -> dict[str, Any]:
    return fields["files"][0]


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "step": lambda m: m.update(step=7),
    "attempt": lambda m: m.update(attempt=7),
    "older format": lambda m: m.update(format=0),
    "no format": lambda m: m.pop("format"),
    "unknown field": lambda m: m.update(colour="red"),
    "text for a number": lambda m: m.update(step="2"),
    "digest of a tensor": lambda m: m["tensors"]["updates"].update(digest="0" * 16),
    "format of a tensor": lambda m: m["tensors"]["param/up/first"].update(dtype="F8"),
    "shape of a tensor": lambda m: m["tensors"]["param/up/first"].update(shape=[4, 3, 6]),
    "negative shape": lambda m: m["tensors"]["param/up/first"].update(shape=[-4, -3, 5]),
    "tensor gone": lambda m: m["tensors"].pop("updates"),
    "path for a name": lambda m: chunk(m).update(name="../../etc/passwd"),
    "hidden name": lambda m: chunk(m).update(name=".x"),
    "file twice": lambda m: m["files"].append(chunk(m)),
    "no files": lambda m: m.update(files=[]),
    "chunk size": lambda m: chunk(m).update(chunk_bytes=0),
    "chunk gone": lambda m: chunk(m)["chunks"].pop(),
    "chunks swapped": lambda m: chunk(m)["chunks"].reverse(),
    "digest of a file": lambda m: chunk(m).update(sha256="0" * 64),
    "size": lambda m: chunk(m).update(bytes=chunk(m)["bytes"] - 1),
    "piece gone": lambda m: chunk(m)["pieces"].pop(),
    "piece of nothing": lambda m: chunk(m)["pieces"][0].update(name="x"),
    "negative begin": lambda m: chunk(m)["pieces"][0].update(begin=-1),
    "backwards": lambda m: chunk(m)["pieces"][0].update(begin=5, end=2),
    "beyond the file": lambda m: chunk(m)["pieces"][-1].update(offset=1 << 50),
    "one over another": lambda m: chunk(m)["pieces"][1].update(offset=chunk(m)["pieces"][0]["offset"]),
    "before the file": lambda m: chunk(m)["pieces"][0].update(offset=-8),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_edited_by_hand_is_refused(edit: str) -> None:
    """With its digest made right again, so that each contradiction is found for itself, before a number is trusted."""
    fs = saved(1, 2)
    folder = newest(fs)
    edited(fs, EDITS[edit])
    if edit != "digest of a tensor":  # which only the tensors can tell
        with pytest.raises(InputError, match=str(folder)):
            manifests.read(fs, folder)
    said: list[str] = []
    assert number_in(fs, report=said.append) == 1
    assert said


def test_a_file_by_a_hidden_or_path_name_is_refused() -> None:
    """Though it is there by that name, whole."""
    fs = saved(1)
    folder = fs.folder(newest(fs))
    folder[".x"] = folder.pop("rank-000.safetensors")
    edited(fs, lambda m: chunk(m).update(name=".x"))
    with pytest.raises(InputError, match=r"a plain name of a file, got '\.x'"):
        number_in(fs)


def test_a_rank_that_reads_another_manifest_is_told() -> None:
    """It looks into a folder of the same name on a disk of its own; nobody loads half of each."""
    disks = saved(1, 2), saved(1, 2)
    lineage = manifests.read(disks[0], newest(disks[0])).lineage
    for name in disks[1].names(ROOT)[1:]:
        content = disks[1].content(ROOT / name / manifests.FILE)
        fields = json.loads(content.partition(b"\n")[0]) | {"lineage": lineage, "score": 1.0}
        line = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        content[:] = line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"

    def restore(rank: int, all_gather_text: Any) -> Any:
        mine = [whole(*each) for each in values(0).items()]
        return restore_(
            disks[rank], ROOT, lambda _: mine, report=lambda problem: None, rank=rank, all_gather_text=all_gather_text
        )

    for error in on_ranks(2, restore):
        assert isinstance(error, InputError), error
        assert "expected the same manifest on every rank, got another; " in str(error.problems)


def test_a_manifest_in_another_spelling_is_refused() -> None:
    fs = saved(1)
    edited(fs, lambda m: None, lambda value: json.dumps(value, indent=1).replace("\n", " "))
    assert detected(fs)


def test_an_edit_that_no_check_of_the_manifest_sees_is_found_in_the_tensors() -> None:
    """Two tensors of one shape change their places: every number fits, only the digests of the tensors do not."""
    fs = MemoryFs()
    tensors = {name: torch.arange(6.0) + index for index, name in enumerate("ab")}
    with open_writer(fs, ROOT, keep=Keep()) as writer:
        writer.save([whole(*each) for each in tensors.items()], step=1, meta={})
    edited(fs, lambda m: [piece.update(name="ab"["ba".index(piece["name"])]) for piece in chunk(m)["pieces"]])
    manifest = entries(fs, ROOT)[0].manifest
    assert manifest is not None
    assert len(verify(fs, newest(fs), manifest)) == 2
    with pytest.raises(InputError, match="expected digest .* of tensor 'a'"):
        load_(fs, newest(fs), manifest, [whole(*each) for each in tensors.items()])


def test_a_newer_format_is_not_damage() -> None:
    """It is whole, so going back to an older one would throw work away."""
    fs = saved(1, 2)
    edited(fs, lambda m: m.update(format=manifests.FORMAT + 1, colour="red"))
    with pytest.raises(InputError, match="continue with a newer nmoe"):
        number_in(fs)


def test_two_runs_in_one_folder_are_refused() -> None:
    fs, other = saved(1), saved(7, 8)
    name = other.names(ROOT)[-1]
    fs.make_folder(ROOT / name)
    for file in other.names(ROOT / name):
        handle = fs.create(ROOT / name / file, 0)
        fs.write(handle, other.content(ROOT / name / file), 0)
    with pytest.raises(InputError, match="the checkpoints of one run, got those of 2"):
        number_in(fs)


def test_when_all_are_damaged_all_are_named() -> None:
    fs = saved(1, 2, 3)
    for name in fs.names(ROOT)[1:]:
        fs.content(ROOT / name / "rank-000.safetensors")[4100] ^= 1
    with pytest.raises(InputError, match="3 damaged ones") as error:
        number_in(fs)
    assert all(any(name in problem for problem in error.value.problems) for name in fs.names(ROOT)[1:])


def test_verify_reads_what_loading_reads(tmp_path: Path) -> None:
    """On a real disk, with chunks that cut tensors and elements; safetensors itself reads the file."""
    root, said = tmp_path / "checkpoints", []
    with open_writer(Disk(), root, keep=Keep(), chunk_bytes=1001) as writer:
        writer.save(pieces(values(5)), step=5, meta={"number": 5})
    assert number_in(Disk(), root) == 5
    manifest = manifest_in(Disk(), root)
    assert isinstance(manifest, Manifest)
    folder = root / manifest.name()
    assert verify(Disk(), folder, manifest, said.append) == () and said == [manifest.num_bytes()]
    with safe_open(folder / "rank-000.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in values(5).items())
    content = bytearray((folder / "rank-000.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "rank-000.safetensors").write_bytes(content)
    assert "bytes 4004 to" in verify(Disk(), folder, manifest)[0]


@pytest.mark.parametrize("reader", [0, 1])
def test_ranks_hear_of_damage_that_one_of_them_read(reader: int) -> None:
    """Rank 1 alone reads its experts, rank 0 alone the header; all go back to the older checkpoint together."""
    fs = saved(1, 2, world=2)
    path = newest(fs) / "rank-001.safetensors"
    manifest = manifests.read(fs, newest(fs))
    piece = next(piece for piece in manifest.files[1].pieces if piece.name == "param/up/first")
    fs.content(path)[piece.offset if reader == 1 else 20] ^= 1

    def restore(rank, all_gather_text) -> Any:
        mine = [
            piece if "/up/" in piece.name else whole(piece.name, values(0)[piece.name])
            for piece in pieces(values(0), rank, 2)
        ]
        found = restore_(
            fs, ROOT, lambda _: mine, report=lambda problem: None, rank=rank, all_gather_text=all_gather_text
        )
        return found and (
            found.step,
            all(torch.equal(p.tensor, q) for p, q in zip(mine, expected(1, rank), strict=True)),
        )

    assert on_ranks(2, restore) == [(1, True)] * 2


def expected(number: int, rank: int) -> list[torch.Tensor]:
    """What rank `rank` of two has of a state."""
    return [
        piece.tensor if "/up/" in piece.name else values(number)[piece.name]
        for piece in pieces(values(number), rank, 2)
    ]
