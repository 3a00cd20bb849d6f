"""A tokenizer as the `tokenizer.json` of Hugging Face, which gives the same tokens."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from nmoe.effects.data.tokenizer import END_OF_TEXT, Tokenizer, byte_of_letter, encode, encoding
from nmoe.errors import InputError

CHECKED_BYTES = 1_000_000
"""Of text encoded both ways: a second."""


def convert(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, str]:
    """The files `tokenizer.json` and `tokenizer_config.json`, by name.

    `<|endoftext|>` in a text is ordinary text here and the special token there, as everybody's is.

    texts    are encoded both ways
    Raises:  InputError when `tokenizers` is not installed, or the tokens of a text are others.
    """
    try:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Theirs
    except ImportError as error:
        raise InputError(
            f'tokenizer.json: expected the extra `hf` for "tokenizers", got {error}; pip install "nmoe[hf]"'
        ) from error
    letter_of = {byte: letter for letter, byte in byte_of_letter().items()}
    letters = {token: "".join(letter_of[byte] for byte in token) for token in tokenizer.ranks}
    merges = [(letters[left], letters[right]) for left, right in _merges(tokenizer)]
    vocabulary = {letters[token]: rank for token, rank in tokenizer.ranks.items()}
    # tiktoken looks a whole piece up before it merges
    made = Theirs(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    content = json.loads(made.to_str())
    content["added_tokens"] = [
        {
            "id": tokenizer.end_of_text,
            "content": END_OF_TEXT,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    text = json.dumps(content, ensure_ascii=False)
    loaded, ours = Theirs.from_str(text), encoding(tokenizer)
    for sample in texts:
        expected, got = encode(ours, sample).tolist(), loaded.encode(sample, add_special_tokens=False).ids
        if expected != got and END_OF_TEXT not in sample:
            raise InputError(
                f"tokenizer {tokenizer.name}: expected the same tokens from tokenizer.json, got others for a text of "
                f"{len(sample)} characters; report it"
            )
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(about, indent=2) + "\n"}


def _merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that are a token side by side, in order of its rank: tiktoken merges all of them."""
    ranks = tokenizer.ranks
    return [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def texts() -> Iterator[str]:
    """A corpus that every machine has: files of the standard library, about `CHECKED_BYTES`."""
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        yield text
        if size > CHECKED_BYTES:
            return
