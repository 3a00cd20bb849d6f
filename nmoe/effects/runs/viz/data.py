"""The data inspector: prepared folders under the roots given, their shards, and single documents as text and tokens.

Nothing outside a root is opened: each path is resolved first, whatever links it goes through.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nmoe.effects.data import tokenizer
from nmoe.effects.data.store.format import Manifest, Receipt, read_manifest, size_problems
from nmoe.effects.runs.viz import api
from nmoe.errors import InputError

MANIFEST = "manifest.json"
MAX_FOLDERS = 200
MAX_DEPTH = 3
MAX_MANIFEST_BYTES = 64 << 20
MAX_TOKENS = 4096
"""Tokens of a document that are shown."""


def data_roots(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The roots, resolved.

    Raises:  InputError when one is no folder.
    """
    missing = [path for path in paths if not path.is_dir()]
    if missing:
        raise InputError(*(f"--data: expected a folder of prepared data, got {path}; name another" for path in missing))
    return tuple(path.resolve() for path in paths)


def inside(path: Path, root: Path) -> Path:
    """`path` with every link followed, which lies in `root`.

    Raises:  InputError when it does not.
    """
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise InputError(
            f"{path.name}: expected a path inside the data folders, got one that leads out of them; copy it there"
        )
    return real


def folders(roots: Sequence[Path]) -> api.Folders:
    """What the prepared folders under some roots hold."""
    known_folders = _prepared_folders(roots)
    return api.Folders(folders=[_folder(number, path, root) for number, (path, root) in enumerate(known_folders)])


def _prepared_folders(roots: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The folders with a manifest under each root, and the root, in a fixed order."""
    known_folders: list[tuple[Path, Path]] = []
    for root in roots:
        for path, names, files in os.walk(root):
            depth = len(Path(path).relative_to(root).parts)
            names[:] = [] if MANIFEST in files or depth >= MAX_DEPTH else sorted(n for n in names if n[0] != ".")
            if MANIFEST in files and len(known_folders) < MAX_FOLDERS:
                known_folders.append((Path(path), root))
    return known_folders


def _folder(number: int, path: Path, root: Path) -> api.Folder:
    try:
        manifest = _manifest(path, root)
        splits = [
            api.Split(
                name=name,
                tokens=split.tokens,
                documents=split.documents,
                bytes=split.bytes,
                shards=[_shard(path / name, root, place, shard) for place, shard in enumerate(split.shards)],
            )
            for name, split in manifest.splits.items()
        ]
    except InputError as error:
        return api.Folder(
            number=number, path=str(path), tokenizer="", tokenizer_size=None, splits=[], problems=list(error.problems)
        )
    problems = [problem for split in manifest.splits for problem in size_problems(path, manifest, split)]
    return api.Folder(
        number=number,
        path=str(path),
        tokenizer=manifest.tokenizer_identity,
        tokenizer_size=manifest.tokenizer_size,
        splits=splits,
        problems=problems[:20],
    )


def _manifest(path: Path, root: Path) -> Manifest:
    """The manifest of a folder, every file of it inside the root and not too large to show."""
    for name in (MANIFEST, tokenizer.FILE):
        file = inside(path / name, root)
        if file.exists() and file.stat().st_size > MAX_MANIFEST_BYTES:
            raise InputError(
                f"{path / name}: expected at most {MAX_MANIFEST_BYTES} bytes to be shown, got "
                f"{file.stat().st_size}; use the CLI"
            )
    return read_manifest(path)


def _shard(split: Path, root: Path, place: int, receipt: Receipt) -> api.Shard:
    file = inside(split / f"shard-{place:05d}.npy", root)
    return api.Shard(
        file=file.name,
        tokens=receipt.tokens,
        documents=receipt.documents,
        bytes=receipt.bytes,
        size_bytes=file.stat().st_size if file.is_file() else None,
        sha256=receipt.sha256,
    )


def document(roots: Sequence[Path], folder: int, split: str, number: int) -> api.Document:
    """A document of a split by its number, decoded.

    Raises:  InputError when there is no such folder, split or document, or a shard is not what the manifest says.
    """
    known_folders = _prepared_folders(roots)
    if not 0 <= folder < len(known_folders):
        raise InputError(
            f"folder: expected a number below {len(known_folders)}, got {folder}; reload the list of folders"
        )
    path, root = known_folders[folder]
    manifest = _manifest(path, root)
    if split not in manifest.splits:
        raise InputError(
            f"split: expected one of {', '.join(manifest.splits) or 'none'}, got {split!r}; choose one of them"
        )
    receipts = manifest.splits[split].shards
    ends = np.cumsum([receipt.documents for receipt in receipts])
    documents = int(ends[-1]) if len(ends) else 0
    if not 0 <= number < documents:
        raise InputError(f"document: expected a number below {documents}, got {number}; choose a lower one")
    place = int(np.searchsorted(ends, number, side="right"))
    ids = _tokens(path / split, root, place, number - (int(ends[place - 1]) if place else 0), receipts[place])
    encoding = tokenizer.encoding(tokenizer.load(path))
    shown = [token for token in ids[:MAX_TOKENS].tolist() if 0 <= token < manifest.tokenizer_size]
    pieces = [encoding.decode_single_token_bytes(token) for token in shown]
    return api.Document(
        split=split,
        number=number,
        documents=documents,
        num_tokens=max(0, len(ids) - 1),
        text=b"".join(pieces[: len(shown)]).decode("utf-8", "replace"),
        tokens=[
            api.Token(id=token, text=piece.decode("utf-8", "backslashreplace"))
            for token, piece in zip(shown, pieces, strict=True)
        ],
        left_out=max(0, len(ids) - MAX_TOKENS),
    )


def _tokens(split: Path, root: Path, place: int, number: int, receipt: Receipt) -> np.ndarray:
    """The tokens of one document of a shard, its end of text included."""
    files = [inside(split / f"shard-{place:05d}{ending}", root) for ending in (".npy", ".ends.npy")]
    try:
        tokens, ends = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{files[0].name}: expected an array, got {error}; restore the file or prepare the data again"
        ) from error
    if tokens.shape != (receipt.tokens,) or ends.shape != (receipt.documents,):
        raise InputError(
            f"{files[0].name}: expected {receipt.tokens} tokens and {receipt.documents} documents, got "
            f"{tokens.shape} and "
            f"{ends.shape}; restore the file or prepare the data again"
        )
    start, stop = (int(ends[number - 1]) if number else 0), int(ends[number])
    if not 0 <= start <= stop <= receipt.tokens:
        raise InputError(f"{files[1].name}: expected ascending ends, got {start} and {stop}; prepare the data again")
    return np.array(tokens[start:stop])
