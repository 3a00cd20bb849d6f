"""The tokenizers of this machine: trained here or added from files, each in a folder of its own under its name."""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from nmoe.config.data_source import Source
from nmoe.effects import files
from nmoe.effects.data import hf_tokenizer, tokenizer
from nmoe.effects.data.prepare.inputs import find
from nmoe.effects.data.prepare.survey import cleaned, reporting, works_of
from nmoe.effects.data.store.format import NAME
from nmoe.effects.data.store.records import read_object
from nmoe.effects.data.tokenizer import Tokenizer
from nmoe.effects.terminal import Progress, say_json
from nmoe.errors import InputError, printable
from nmoe.pure.data.prep import MILLION, split_of
from nmoe.pure.units import counted

FOLDER = "tokenizers"
LARGEST = 1 << 27


@attrs.frozen(kw_only=True)
class Known:
    """A published tokenizer whose file of ranks a person brings along."""

    sha256: str
    pattern: str
    end_of_text: int
    size: int


O200K = Known(
    sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    pattern="|".join(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
    end_of_text=199_999,
    size=200_019,
)
KNOWN: Mapping[str, Known] = MappingProxyType(
    {
        # Ranks, patterns and special tokens as tiktoken has them; of o200k_harmony the special tokens are gpt-oss's.
        "r50k_base": Known(
            sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
            pattern=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
            end_of_text=50_256,
            size=50_257,
        ),
        "cl100k_base": Known(
            sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            pattern=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
            r"\s*[\r\n]|\s+(?!\S)|\s",
            end_of_text=100_257,
            size=100_277,
        ),
        "o200k_base": O200K,
        "o200k_harmony": attrs.evolve(O200K, size=201_088),
    }
)


def resolve(said: str, home: Path, base: Path) -> Tokenizer:
    """The tokenizer of this name, or of this file or folder relative to `base`.

    Raises:  InputError when there is none, or it is damaged.
    """
    if "/" in said or said.endswith(".json"):
        path = base / files.expanded(said)
        file = path / tokenizer.FILE if path.is_dir() else path
        if not file.exists():
            raise InputError(
                f"tokenizer {said}: expected a file or a folder, got none at {file}; fix the path, or name one of "
                "`nmoe data tokenizer list`"
            )
        if "model" in read_object(file):
            raise InputError(
                f"{file}: expected a tokenizer that nmoe has written, got one of Hugging Face; add it with "
                f"`nmoe data tokenizer add NAME --from {file}`, and give that name"
            )
        return tokenizer.load_file(file)
    folder = home / FOLDER / said
    if not (folder / tokenizer.FILE).exists():
        names = ", ".join(sorted(path.name for path in (home / FOLDER).glob("*") if path.is_dir())) or "none"
        how = "add it with `nmoe data tokenizer add`" if said in KNOWN else "train it with `nmoe data tokenizer train`"
        raise InputError(
            f"tokenizer {said}: expected one of those in {home / FOLDER}: {names}, got one that is not there; {how}"
        )
    return tokenizer.load(folder)


def install(made: Tokenizer, name: str, home: Path) -> Path:
    """Keep a tokenizer under a name.

    Writes:  `home`/tokenizers/<name>; one with another identity is never replaced.
    """
    folder = _place(name, home)
    if (folder / tokenizer.FILE).exists():
        present = tokenizer.load(folder)
        if present.identity != made.identity:
            raise InputError(
                f"tokenizer {name}: expected a name that is free or of {made.identity[:12]}, got "
                f"{present.identity[:12]} under it; choose another name, or delete {folder}"
            )
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(attrs.evolve(made, name=name), folder)
    except OSError as error:
        raise InputError(
            f"{folder}: expected a folder to write to, got {error.strerror}; set NMOE_HOME to another"
        ) from error
    return folder


def check_free(name: str, home: Path) -> None:
    """Refuse a name before the work of training a tokenizer for it.

    Raises:  InputError when a tokenizer has it already, or none can have it.
    """
    folder = _place(name, home)
    if (folder / tokenizer.FILE).exists():
        raise InputError(
            f"tokenizer {name}: expected a name that is free, got one that {folder} has; choose another with --name, "
            "or delete that folder"
        )


def _place(name: str, home: Path) -> Path:
    """The folder of the tokenizer of this name.

    Raises:  InputError when none can have it.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"tokenizer {name}: expected up to 64 letters, digits, '.', '_' and '-', got another name; rename it"
        )
    return home / FOLDER / name


def add(name: str, path: Path, known: Mapping[str, Known] = KNOWN) -> Tokenizer:
    """A published tokenizer from its file.

    path     a `tokenizer.json` of Hugging Face, or the folder that holds it; else the ranks of a known one, plain or
             gzip: a line a token, base64, blank, rank
    Raises:  InputError as `hf_tokenizer.read`; when the name is not known, the file can not be read, or is another
             than the published one.
    """
    if path.is_dir() or path.suffix == ".json":
        return hf_tokenizer.read(path, hf_tokenizer.texts())
    if name not in known:
        raise InputError(
            f"tokenizer {name}: expected one of {', '.join(known)}, got another, and a file of ranks has no pattern "
            f"and no special tokens; give the {tokenizer.FILE} of Hugging Face that the model comes with, or train one"
        )
    about = known[name]
    try:
        raw = path.read_bytes() if files.regular_size(path) <= LARGEST else b""
        if raw[:2] == b"\x1f\x8b":
            raw = _unzipped(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a file that can be read, got {error}; give another") from error
    if (actual := hashlib.sha256(raw).hexdigest()) != about.sha256:
        raise InputError(
            f"{path}: expected the ranks of {name} with sha256 {about.sha256}, got {actual}; give the published file"
        )
    try:
        lines = [line.split() for line in raw.splitlines() if line]
        ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
        tokens = [ranks[rank] for rank in range(len(lines))]
    except (ValueError, KeyError, binascii.Error) as error:
        raise InputError(
            f"{path}: expected lines of base64 and rank from 0 on, got {error}; give the published file"
        ) from error
    return tokenizer.make(name, about.pattern, tokens, end_of_text=about.end_of_text, size=about.size)


def learn(
    source: Source, base: Path, size: int, most_bytes: int, say: Callable[[str], None], folder: Path
) -> Tokenizer:
    """A tokenizer trained on the training split of a source, cleaned and filtered as it will be prepared.

    most_bytes  files of more than this are sampled by a hash of each document
    folder      where messages place what goes wrong

    Raises:  InputError when the source can not be read or is too small for `size`.
    """
    items = find(source.input, base, skip_unreadable=source.clean.unreadable == "skip", say=say)
    total = sum(sum(item.sizes) for item in items)
    share = min(1.0, most_bytes / max(total, 1))
    works = works_of(source, items, folder)
    validation, test = round(source.splits.validation * MILLION), round(source.splits.test * MILLION)

    def texts() -> Iterator[str]:
        progress = Progress(say, len(works))
        for number, work in enumerate(works, 1):
            for entry in cleaned(work):
                digest = hashlib.sha256(entry.text.encode("utf-8")).digest()
                split = split_of(digest, validation=validation, test=test)
                if entry.reason is None and split == "train" and int.from_bytes(digest[:4], "big") < share * 2**32:
                    yield entry.text
            progress.at(
                number,
                f"tokenizer: {number} of {counted(len(works), 'task')} read, {share:.0%} of their text learnt from",
            )

    with reporting(folder):
        return tokenizer.train(texts(), size, say)


def list_tokenizers(home: Path, say: Callable[[str], None], as_json: bool = False) -> int:
    """Print name, size and fingerprint of every tokenizer of this machine; a damaged one costs its own line only.

    Raises:  InputError with the damaged ones, after the others were printed.
    """
    folders = sorted(path.parent for path in (home / FOLDER).glob(f"*/{tokenizer.FILE}"))
    problems: list[str] = []
    listed: list[dict[str, Any]] = []
    for folder in folders:
        try:
            stored = tokenizer.load(folder)
        except InputError as error:
            problems += error.problems
            continue
        listed.append(
            {"name": folder.name, "tokens": stored.size, "fingerprint": stored.identity, "folder": str(folder)}
        )
        if not as_json:
            say(f"{printable(folder.name):<24} {stored.size:>7} tokens  fingerprint {stored.identity}")
    if as_json:
        say_json(listed)
    if problems:
        raise InputError(*problems)
    if not folders and not as_json:
        say(f"{home / FOLDER}: no tokenizers; train one with `nmoe data tokenizer train`")
    return 0


def _unzipped(raw: bytes) -> bytes:
    """The content of a gzip file, at most LARGEST bytes of it."""
    with gzip.open(io.BytesIO(raw)) as file:
        return file.read(LARGEST)
