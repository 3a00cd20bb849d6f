"""Byte-pair tokenizers: trained with `tokenizers`, kept as one JSON file, run with tiktoken; never online."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import attrs
import numpy as np
import tiktoken

from nmoe.effects import files
from nmoe.effects.data.store.records import read_record, to_text
from nmoe.errors import InputError, pip_install
from nmoe.pure.data.text import pieces

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
FORMAT = 2
MAX_SIZE = 1 << 24
"""Ids of a tokenizer; published ones have up to 262,144. A table of lengths has this many entries."""
MAX_PIECE_CHARS = 1 << 20
"""Characters tokenized at once. A longer document is cut after a line break, which bounds what the tokenizer holds."""
MIN_PIECE_CHARS = 1 << 12
"""Characters on which no pattern of an honest tokenizer runs out of stack; a million blanks do with o200k's."""

# Made for source code. A line break (blank lines included) and the indentation after it are one piece, so that a block
# costs one token a line; the break is no part of the punctuation before it, so that a prompt may end in ":". A word
# takes the one character before it along: " word", ".attribute", "_part". Without look-around, both regular-expression
# engines run it in linear time. Every character belongs to some branch: nothing can be lost.
PATTERN = r"(?:[ \t]*\r?\n)+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


@attrs.frozen(kw_only=True)
class Tokenizer:
    """A byte-pair vocabulary in order of rank, end of text behind it.

    Ids from the last rank to `size` that are not `end_of_text` are other special tokens, which no text gives.
    """

    name: str
    pattern: str
    ranks: Mapping[bytes, int]
    end_of_text: int
    size: int
    identity: str


@attrs.frozen(kw_only=True)
class _Stored:
    """The file: `tokens` in order of rank, base64."""

    format: int
    name: str
    pattern: str
    tokens: tuple[str, ...]
    end_of_text: int
    size: int
    identity: str


def train(texts: Iterable[str], size: int, say: Callable[[str], None]) -> Tokenizer:
    """Learn a vocabulary of `size` tokens: 256 bytes, `size` - 257 merges, end of text.

    The same texts in the same order give the same tokenizer. `<|endoftext|>` in a text is ordinary text.

    say      receives a line when the texts are counted and one when the merges are learnt

    Raises:  InputError when `tokenizers` is not installed, `size` < 257, or the texts hold too few repeated pairs.
    Cost:    about 3 s for 11 MB and 4096 tokens on two cores.
    """
    if size < 257:
        raise InputError(f"tokenizer_size: expected at least 257 (256 bytes and end of text), got {size}; raise it")
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainable
    except ImportError as error:
        raise InputError(
            f"tokenizer: expected the package tokenizers, got none; install it with: {pip_install('data')}"
        ) from error

    began = time.monotonic()

    def counted() -> Iterator[str]:
        num_bytes = 0
        for text in texts:
            num_bytes += len(text.encode("utf-8"))
            yield text
        took = time.monotonic() - began
        say(
            f"tokenizer: {num_bytes / 1e6:.1f} MB counted in {took:.1f} s; {size - 257} merges take about as long again"
        )

    learnt = Trainable(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learnt.train_from_iterator(
        counted(),
        trainers.BpeTrainer(
            vocab_size=size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        ),
    )
    byte_of = byte_of_letter()
    in_order = sorted(learnt.get_vocab().items(), key=lambda item: item[1])
    merges = [bytes(byte_of[letter] for letter in letters) for letters, _ in in_order if len(letters) > 1]
    if len(merges) != size - 257:
        raise InputError(
            f"tokenizer: expected a vocabulary of at most {len(merges) + 257} tokens, which these texts give, got "
            f"{size}; ask for fewer or give more text"
        )
    say(f"tokenizer: {size} tokens learnt in {time.monotonic() - began:.1f} s")
    tokens = [*(bytes([byte]) for byte in range(256)), *merges]
    return make(f"bpe-{size}", PATTERN, tokens, end_of_text=size - 1, size=size)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer to `folder`.

    Writes:  `folder`/tokenizer.json, whole or not at all.
    """
    files.write_text(folder / FILE, content(tokenizer))


def content(tokenizer: Tokenizer) -> str:
    """What `save` writes."""
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    return to_text(
        _Stored(
            format=FORMAT,
            name=tokenizer.name,
            pattern=tokenizer.pattern,
            tokens=tuple(base64.b64encode(token).decode("ascii") for token in tokens),
            end_of_text=tokenizer.end_of_text,
            size=tokenizer.size,
            identity=tokenizer.identity,
        )
    )


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `folder`; raises as `load_file`."""
    return load_file(folder / FILE)


def load_file(path: Path) -> Tokenizer:
    """The tokenizer in a file that `save` wrote, whatever its name.

    Raises:  InputError when the file is absent, not of this format, or its content has another identity than it says.
    """
    stored = read_record(path, _Stored, version=FORMAT)
    try:
        tokens = [base64.b64decode(token, validate=True) for token in stored.tokens]
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{path}: expected tokens in base64, got {error}; prepare the data again") from error
    if not len(tokens) <= stored.end_of_text < stored.size <= MAX_SIZE:
        raise InputError(
            f"{path}: expected {len(tokens)} tokens <= end_of_text < size <= {MAX_SIZE}, got {stored.end_of_text} and "
            f"{stored.size}; restore the file"
        )
    distinct = set(tokens)
    if len(distinct) < len(tokens) or b"" in distinct or not all(bytes([byte]) in distinct for byte in range(256)):
        raise InputError(
            f"{path}: expected tokens that differ, none empty, the 256 bytes among them, got others; restore the file"
        )
    if not stored.name.isprintable():
        raise InputError(f"{path}: expected a printable name, got {stored.name[:80]!r}; restore the file")
    loaded = make(stored.name, stored.pattern, tokens, end_of_text=stored.end_of_text, size=stored.size)
    if loaded.identity != stored.identity:
        raise InputError(
            f"{path}: expected a tokenizer with fingerprint {stored.identity[:80]}, got {loaded.identity}; "
            "prepare the data again"
        )
    return loaded


def encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """The tokenizer ready to run; building it costs milliseconds, so keep it.

    Use `encode` for text that is not ours: `<|endoftext|>` in it is then text.

    Raises:  InputError when the pattern is no regular expression.
    """
    try:
        return tiktoken.Encoding(
            tokenizer.name,
            pat_str=tokenizer.pattern,
            mergeable_ranks=dict(tokenizer.ranks),
            special_tokens={END_OF_TEXT: tokenizer.end_of_text},
        )
    except ValueError as error:
        raise InputError(
            f"tokenizer {tokenizer.name}: expected a regular expression as pattern, got {str(error)[:160]}; "
            "choose another tokenizer"
        ) from error


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens of a document: [n] u32. `<|endoftext|>` in it is ordinary text.

    Raises:  InputError when the pattern runs out of stack, or leaves a part of the text out.
    """
    tokens = [part for piece in pieces(text, MAX_PIECE_CHARS) for part in _encoded(encoding, piece)]
    return tokens[0] if len(tokens) == 1 else np.concatenate(tokens)


def _encoded(encoding: tiktoken.Encoding, text: str) -> list[np.ndarray]:
    """The tokens of a piece; of one on which the pattern runs out of stack, those of its halves."""
    try:
        return [encoding.encode_to_numpy(text, disallowed_special=())]
    except ValueError as error:
        if len(text) <= MIN_PIECE_CHARS:
            raise InputError(
                f"tokenizer {encoding.name}: expected a pattern that cuts any {len(text)} characters, got "
                f"{str(error)[:160]}; choose another tokenizer"
            ) from error
    except BaseException as error:
        # tiktoken is Rust: a pattern that matches nothing makes it panic, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"tokenizer {encoding.name}: expected a pattern that cuts a text into pieces, got a panic: "
            f"{str(error)[:160]}; choose another tokenizer"
        ) from error
    return [part for half in pieces(text, (len(text) + 1) // 2) for part in _encoded(encoding, half)]


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for: [size] i32, 0 for end of text."""
    lengths = np.zeros(tokenizer.size, dtype=np.int32)
    for token, rank in tokenizer.ranks.items():
        lengths[rank] = len(token)
    return lengths


def make(name: str, pattern: str, tokens: list[bytes], *, end_of_text: int, size: int) -> Tokenizer:
    """The value with these tokens in order of rank. Its identity is a hash of everything but the name.

    The size is hashed where it does not follow from the rest.
    """
    specials = {END_OF_TEXT: end_of_text}
    follows = size == end_of_text + 1 == len(tokens) + 1
    said = json.dumps([pattern, [token.hex() for token in tokens], specials, *([] if follows else [size])])
    return Tokenizer(
        name=name,
        pattern=pattern,
        ranks={token: rank for rank, token in enumerate(tokens)},
        end_of_text=end_of_text,
        size=size,
        identity=hashlib.sha256(said.encode("utf-8")).hexdigest(),
    )


def byte_of_letter() -> dict[str, int]:
    """The byte behind each letter of the ByteLevel alphabet: visible Latin-1 is itself, the rest follows 255."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(others)}
