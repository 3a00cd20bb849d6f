"""A tokenizer as the `tokenizer.json` of Hugging Face, both ways: the same tokens."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from nmoe.config import sections
from nmoe.effects import files
from nmoe.effects.checkpoint.hf_import import json_object
from nmoe.effects.data import hf_pattern
from nmoe.effects.data.tokenizer import (
    END_OF_TEXT,
    FILE,
    MAX_SIZE,
    Tokenizer,
    byte_of_letter,
    content,
    encode,
    encoding,
    make,
)
from nmoe.effects.terminal import say
from nmoe.errors import InputError, pip_install, printable

CHECKED_BYTES = 1_000_000
"""Of text encoded both ways: a second."""

HARD = "naïve DON'T 東京 ١٢٣ 1234567 🙂🏽 e\u0301 \u200b\u2028\r\n\r\n\t  x\n\n   \n\x00\x7f __init__.py->(a,b)[::-1] "
"""A text of what patterns cut in different ways."""

LISTED = 20
"""Problems of one file that are listed."""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` cuts by where no `Split` is before it."""


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
        raise _not_installed(error) from error
    letter_of = {byte: letter for letter, byte in byte_of_letter().items()}
    letters = {token: "".join(letter_of[byte] for byte in token) for token in tokenizer.ranks}
    merges = [(letters[left], letters[right]) for left, right in _merges(tokenizer)]
    # a special token that is not in the vocabulary gets the next free id from them, whatever the file says
    vocabulary = {letters[token]: rank for token, rank in tokenizer.ranks.items()} | {
        END_OF_TEXT: tokenizer.end_of_text
    }
    # tiktoken looks a whole piece up before it merges
    made = Theirs(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    said = json.loads(made.to_str())
    said["added_tokens"] = [
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
    text = json.dumps(said, ensure_ascii=False)
    _compare(tokenizer, Theirs.from_str(text), (END_OF_TEXT,), texts, f"tokenizer {tokenizer.name}", "report it")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(about, indent=2) + "\n"}


def read(path: Path, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of the folder that holds it, as one of ours: byte-pair encoding of bytes.

    tiktoken merges any two tokens that are a token side by side, and theirs what it lists. Both give the same tokens
    when the ids are in the order of the merges and every token is what its own bytes are merged to: of two tokens that
    only tiktoken would merge, the merges inside them have been those of the token that they make, which end in it.

    `Isolated` pieces keep what the pattern leaves out, which tiktoken drops: a last branch of ours matches it. The end
    of text is what the files beside it say, `eos_token` of tokenizer_config.json or `eos_token_id` of config.json, or
    the only special token, or `<|endoftext|>`. Other special tokens are ids that no text gives.

    texts    are encoded both ways
    Raises:  InputError when `tokenizers` is not installed, the file is another kind of tokenizer, all that is another
             at once, or the tokens of a text are others.
    """
    path = path / FILE if path.is_dir() else path
    try:
        from tokenizers import Tokenizer as Theirs
    except ImportError as error:
        raise _not_installed(error) from error
    given = json_object(path)
    try:
        loaded = Theirs.from_str(json.dumps(given))
    except Exception as error:  # of no class of its own
        raise InputError(
            f"{path}: expected a tokenizer that `tokenizers` loads, got {printable(str(error)[:160])}; copy it again"
        ) from error
    said = json.loads(loaded.to_str())  # every key is there and has its type
    special = {token["content"]: token["id"] for token in said["added_tokens"]}
    pattern, problems = _expressed(said)
    tokens: list[bytes] = []
    if not problems:
        tokens, problems = _tokens(said["model"], special)
    problems += [
        f"expected {json.dumps(token['content'])} as {token['id']}, which the file says, got "
        f"{special.get(token['content'])} by `tokenizers`; write it into the vocabulary too"
        for token in given.get("added_tokens") or ()
        if special.get(token["content"]) != token["id"]
    ]
    if problems:
        raise InputError(*(f"{path}: {problem}" for problem in problems[:LISTED]))
    end_of_text = _end_of_text(path, special)
    size = 1 + max(len(tokens) - 1, *special.values())
    if size > MAX_SIZE:
        raise InputError(f"{path}: expected at most {MAX_SIZE} ids, got {size}; choose another tokenizer")
    made = make(f"hf-{size}", pattern, tokens, end_of_text=end_of_text, size=size)
    if said["pre_tokenizer"]["type"] == "Sequence" and not said["pre_tokenizer"]["pretokenizers"][0]["invert"]:
        made = _lossless(made)
    hidden = [token["content"] for token in said["added_tokens"] if token["special"]]
    _compare(made, loaded, hidden, (HARD, *texts), str(path), "choose another tokenizer")
    return made


def of_folder(folder: Path, c: sections.Model) -> dict[str, str]:
    """The file of the tokenizer of an imported model, by name; none where the folder has no `tokenizer.json`.

    Raises:  InputError as `read`, or when the model has no row for some of its ids.
    """
    if not files.is_file(folder / FILE):
        say(f"{folder}: no {FILE}, so no tokenizer comes along; add one to the folder to generate, evaluate and train")
        return {}
    tokenizer = read(folder, texts())
    if tokenizer.size > c.vocab_size:
        raise InputError(
            f"{folder / FILE}: expected at most vocab_size = {c.vocab_size} ids, got {tokenizer.size}; take the files "
            "of one model"
        )
    return {FILE: content(tokenizer)}


def _expressed(said: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The pattern that cuts a text into pieces, and what of the tokenizer nmoe has no other for."""
    remedy = "nmoe has byte-level BPE alone"
    kind = said["model"]["type"]
    if kind != "BPE" or said["model"]["byte_fallback"]:
        got = "BPE with byte_fallback" if kind == "BPE" else kind
        return "", [f"expected byte-level BPE as model, got {got}; {remedy}"]
    problems = [
        f"model.{key}: expected none, got {json.dumps(said['model'][key])}; {remedy}"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if said["model"][key]
    ]
    if said["normalizer"] is not None and said["normalizer"].get("normalizers") != []:
        problems.append(
            f"normalizer: expected none, got {said['normalizer']['type']}; it changes texts, and nmoe keeps every byte"
        )
    if (said["decoder"] or {}).get("type") != "ByteLevel":
        problems.append(f"decoder: expected ByteLevel, got {_type(said['decoder'])}; {remedy}")
    cut = said["pre_tokenizer"]
    parts = cut["pretokenizers"] if _type(cut) == "Sequence" else [cut]
    types = [_type(part) for part in parts]
    if types[-1] != "ByteLevel" or set(types[:-1]) - {"Split"}:
        problems.append(f"pre_tokenizer: expected Splits and ByteLevel, got {', '.join(types)}; {remedy}")
        return "", problems
    if parts[-1]["add_prefix_space"]:
        problems.append("pre_tokenizer: expected add_prefix_space = false, got true; it changes texts")
    if len(parts) == 1:
        if not parts[0]["use_regex"]:
            problems.append(f"pre_tokenizer: expected a pattern, got none; {remedy}")
        return GPT2_PATTERN, problems
    if parts[-1]["use_regex"]:
        problems.append(f"pre_tokenizer: expected one pattern, got that of Split and that of ByteLevel; {remedy}")
    for split in parts[:-1]:
        behavior, pattern = (split["behavior"], split["invert"]), split["pattern"]
        if behavior not in (("Isolated", False), *((("Removed", True),) if len(parts) == 2 else ())):
            said_so = f"{behavior[0]}{', inverted' if behavior[1] else ''}"
            problems.append(f"pre_tokenizer: expected matches as pieces, Isolated, got {said_so}; {remedy}")
        if "Regex" not in pattern:
            problems.append(
                f"pre_tokenizer: expected a regular expression, got the text {json.dumps(pattern)}; {remedy}"
            )
    patterns = [split["pattern"].get("Regex", "") for split in parts[:-1]]
    if len(patterns) == 1 or problems:
        return patterns[0], problems
    one = hf_pattern.joined(patterns)
    if one is None:
        problems.append(
            "pre_tokenizer: expected Splits of which all but the last are one class of characters each, apart from "
            f"each other, got {json.dumps(patterns)}; nmoe cannot write them as one pattern"
        )
    return one or "", problems


def _type(part: Any) -> str:
    return "none" if part is None else part["type"]


def _tokens(model: Mapping[str, Any], special: Collection[str]) -> tuple[list[bytes], list[str]]:
    """The bytes of each id from 0 on that a text may give, and why tiktoken would not give it where they do."""
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models

    byte_of = byte_of_letter()
    ids = {letters: number for letters, number in model["vocab"].items() if letters not in special}
    in_order = sorted(ids, key=ids.__getitem__)
    problems = [
        f"expected tokens in the letters of ByteLevel, got {json.dumps(letters)}; nmoe has byte-level BPE alone"
        for letters in in_order
        if not letters or not all(letter in byte_of for letter in letters)
    ]
    if missing := byte_of.keys() - ids.keys():
        problems.append(
            f"expected a token of every byte, got none of {len(missing)} of them; nmoe has byte-level BPE alone"
        )
    numbers = [ids[letters] for letters in in_order]
    if numbers != list(range(len(numbers))):
        at = next(place for place, number in enumerate(numbers) if number != place)
        problems.append(
            f"expected the ids of texts from 0 on without a gap, special ones behind, got {numbers[at]} in the place "
            f"of {at}; nmoe has no other order"
        )
    merges = [tuple(pair) for pair in model["merges"]]
    made = [left + right for left, right in merges]
    problems += [
        f"expected merges to tokens of texts, got one to {json.dumps(token)}; copy it again"
        for token in made
        if token not in ids
    ]
    if problems:
        return [], problems
    problems += [
        f"expected merges in the order of their ids, got {json.dumps(after)} behind {json.dumps(before)}; tiktoken "
        "merges by id"
        for before, after in pairwise(made)
        if ids[after] < ids[before]
    ]
    listed = set(merges)
    bare = Theirs(models.BPE(vocab=dict(model["vocab"]), merges=merges))
    for letters, got in zip(in_order, bare.encode_batch(in_order, add_special_tokens=False), strict=True):
        # what they list all of, and look up whole, is merged as by tiktoken whatever its bytes give
        whole = model["ignore_merges"] and all(
            (letters[:cut], letters[cut:]) in listed
            for cut in range(1, len(letters))
            if letters[:cut] in ids and letters[cut:] in ids
        )
        if got.ids != [ids[letters]] and not whole:
            problems.append(
                f"expected every token to be what its bytes are merged to, got {json.dumps(letters)}, which is not; "
                "tiktoken would give it"
            )
    return [bytes(byte_of[letter] for letter in letters) for letters in in_order], problems


def _end_of_text(path: Path, special: Mapping[str, int]) -> int:
    """The id that ends a text.

    Raises:  InputError when neither the files beside `path` nor its special tokens say which.
    """
    beside = {name: path.with_name(name) for name in ("tokenizer_config.json", "config.json")}
    read = {name: json_object(file) if files.is_file(file) else {} for name, file in beside.items()}
    named = read["tokenizer_config.json"].get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if isinstance(named, str) and named in special:
        return special[named]
    numbered = read["config.json"].get("eos_token_id")
    numbered = numbered[0] if isinstance(numbered, list) and numbered else numbered
    if isinstance(numbered, int) and numbered in special.values():
        return numbered
    if END_OF_TEXT in special:
        return special[END_OF_TEXT]
    if len(special) == 1:
        return next(iter(special.values()))
    names = ", ".join(map(json.dumps, list(special)[:LISTED])) or "none"
    raise InputError(
        f"{path}: expected one special token, or a tokenizer_config.json beside it whose eos_token is one, got "
        f"{names}; write eos_token, the token that ends a text"
    )


def _lossless(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a pattern whose last branch matches what the others leave out, if they leave a character."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    run = encoding(tokenizer)
    if run.decode_bytes(encode(run, every).tolist()) == every.encode():
        return tokenizer
    pattern = rf"(?:{tokenizer.pattern})|(?:(?!(?:{tokenizer.pattern}))[\s\S])+"
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    return make(tokenizer.name, pattern, tokens, end_of_text=tokenizer.end_of_text, size=tokenizer.size)


def _compare(
    ours: Tokenizer, theirs: Any, special: Collection[str], texts: Iterable[str], where: str, remedy: str
) -> None:
    """Encode texts both ways, those apart that hold a special token, which is ordinary text for nmoe.

    Raises:  InputError at the first text whose tokens differ.
    """
    run = encoding(ours)
    for sample in texts:
        if any(token in sample for token in special):
            continue
        if encode(run, sample).tolist() != theirs.encode(sample, add_special_tokens=False).ids:
            raise InputError(
                f"{where}: expected the same tokens from tokenizer.json, got others for a text of {len(sample)} "
                f"characters; {remedy}"
            )


def _not_installed(error: ImportError) -> InputError:
    return InputError(
        f'tokenizer.json: expected the extra `hf` for "tokenizers", got {error}; install it with: {pip_install("hf")}'
    )


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
