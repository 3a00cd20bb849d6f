"""Tokenizers as `tokenizer.json` of Hugging Face, out and in: the same tokens, loaded by `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Theirs
from transformers import AutoTokenizer

from nmoe.cli import main
from nmoe.effects.data import hf_tokenizer, tokenizer
from nmoe.effects.data.tokenizer import END_OF_TEXT, Tokenizer
from nmoe.errors import InputError


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(hf_tokenizer.texts(), 2000, lambda line: None)


@pytest.fixture(scope="module")
def theirs(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers loads."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, text in hf_tokenizer.convert(trained, hf_tokenizer.texts()).items():
        (folder / name).write_text(text, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


HARD = (
    "",
    " ",
    "\r\n\r\n\t  x\n\n   \n",
    "naïve café, 東京 ١٢٣ 🙂🏽 e\u0301 \u200b\u2028 \ufeff",
    "a" * 3000 + " " * 3000 + "\x00\x01\x7f",
    "don't DON'T x1234567 __init__.py->(a,b)[::-1]",
)


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_same_tokens_and_back(text: str, trained: Tokenizer, theirs: Any) -> None:
    ours = tokenizer.encode(tokenizer.encoding(trained), text).tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours
    assert theirs.decode(ours) == text


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_same_tokens_of_any_text(text: str, trained: Tokenizer, theirs: Any) -> None:
    ours = tokenizer.encode(tokenizer.encoding(trained), text).tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours


def test_end_of_text_is_special(trained: Tokenizer, theirs: Any) -> None:
    assert theirs.eos_token_id == trained.end_of_text
    assert theirs.decode([trained.end_of_text]) == END_OF_TEXT
    assert len(theirs) == trained.size


def test_a_pattern_that_they_read_otherwise_is_refused(trained: Tokenizer) -> None:
    """`^` is the start of a line for one engine, of the text for the other."""
    other = attrs.evolve(trained, pattern=r"^class|[\s\S]")
    with pytest.raises(InputError, match="expected the same tokens from tokenizer.json"):
        hf_tokenizer.convert(other, ["def\nclass A"])


def test_out_and_in_again_is_the_same_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    for name, text in hf_tokenizer.convert(trained, ()).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    back = hf_tokenizer.read(tmp_path, ())
    assert (back.ranks, back.pattern, back.end_of_text) == (trained.ranks, trained.pattern, trained.end_of_text)
    assert back.identity == trained.identity


def test_an_end_of_text_behind_a_gap_keeps_its_id(tmp_path: Path) -> None:
    """As that of o200k: the next id after the ranks is of nothing."""
    ours = tokenizer.make("bytes", tokenizer.PATTERN, [bytes([byte]) for byte in range(256)], end_of_text=259, size=260)
    for name, text in hf_tokenizer.convert(ours, (hf_tokenizer.HARD,)).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 259
    assert hf_tokenizer.read(tmp_path, ()).identity == ours.identity


LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS = r"\w+"


DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""Of DeepSeek-V3, one after another."""


def cut_by(*patterns: str, behavior: Any = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior, invert=invert) for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def learnt(cut: Any) -> Any:
    """A tokenizer trained by `tokenizers`, as people publish theirs: one merge a token, special tokens behind."""
    made = Theirs(models.BPE())
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        hf_tokenizer.texts(), trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    return made


CUTS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama": cut_by(LLAMA),
    "only matches": cut_by(LLAMA, behavior="removed", invert=True),
    "leaves text out": cut_by(WORDS),
    "deepseek": cut_by(*DEEPSEEK),
    "a run whose pieces are cut again": cut_by("[a-m ]+", r"[a-f]+|[^\S\n]+(?!\S)|\p{L}x"),
}


@pytest.fixture(scope="module", params=CUTS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """Theirs and, read from its file, ours."""
    folder = tmp_path_factory.mktemp("published")
    made = learnt(CUTS[request.param])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return made, hf_tokenizer.read(folder, hf_tokenizer.texts())


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
@example(text=hf_tokenizer.HARD)
@example(text="12345abc 678 一二か\u3099゠・か 漢12字  三 \u3040x\n\n 9\u0301e\u0301!abc ...\n 1st")
@example(text="abc  dex nox\tmn a b  c  z\n k  \n")
@example(text="the  the\n\n\tdef f(x):\r\n    return 東京 \U0001f642" * 50)
def test_a_published_one_gives_the_same_tokens(text: str, published: tuple[Any, Tokenizer]) -> None:
    theirs, ours = published
    run = tokenizer.encoding(ours)
    ids = tokenizer.encode(run, text).tolist()
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert run.decode_bytes(ids) == text.encode()


def test_ids_of_a_published_one(published: tuple[Any, Tokenizer]) -> None:
    theirs, ours = published
    assert ours.end_of_text == theirs.token_to_id("</s>") == 1201
    assert ours.size == theirs.get_vocab_size() == 1203
    assert len(ours.ranks) == 1200


def test_the_end_of_text_is_what_the_files_say(tmp_path: Path) -> None:
    """The name of tokenizer_config.json, else the id of config.json, else an error that lists the special tokens."""
    learnt(CUTS["gpt-2"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r'got "<s>", "</s>", "<pad>"; write eos_token'):
        hf_tokenizer.read(tmp_path, ())
    (tmp_path / "config.json").write_text('{"eos_token_id": [1202, 1201]}')
    assert hf_tokenizer.read(tmp_path, ()).end_of_text == 1202
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert hf_tokenizer.read(tmp_path, ()).end_of_text == 1201


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Other values of the file, those of `model` by `model_KEY`."""

    def change(said: dict[str, Any]) -> None:
        for key, value in values.items():
            (said["model"] if key.startswith("model_") else said)[key.removeprefix("model_")] = value

    return change


def a_gap(said: dict[str, Any]) -> None:
    """The special tokens lie before the texts', as DeepSeek-V3 has them."""
    vocab = said["model"]["vocab"]
    said["model"]["vocab"] = {token: number + 3 for token, number in vocab.items()}
    for number, token in enumerate(said["added_tokens"]):
        token["id"] = said["model"]["vocab"][token["content"]] = number


def another_order(said: dict[str, Any]) -> None:
    merges = said["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def an_unmerged_token(said: dict[str, Any]) -> None:
    """One merge fewer: a token that theirs gives only by its parts, ours whole."""
    said["model"]["merges"].pop()


def moved(said: dict[str, Any]) -> None:
    """An id that `tokenizers` does not give: it counts on."""
    said["added_tokens"][1]["id"] = 1300


def blanks(said: dict[str, Any]) -> None:
    """Runs of blanks that are looked for before the pattern cuts."""
    said["added_tokens"].append({**said["added_tokens"][0], "id": 1203, "content": "    ", "special": False})


def another_cut(cut: Any) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        made = Theirs(models.BPE())
        made.pre_tokenizer = cut
        said["pre_tokenizer"] = json.loads(made.to_str())["pre_tokenizer"]

    return change


def another_model(model: Any) -> Callable[[dict[str, Any]], None]:
    return changed(model=json.loads(Theirs(model).to_str())["model"])


NFC = json.loads(normalizers.NFC().__getstate__())
BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unigram": (another_model(models.Unigram([("a", 0.0)])), "expected byte-level BPE as model, got Unigram"),
    "word piece": (another_model(models.WordPiece({"a": 0}, unk_token="a")), "got WordPiece"),  # noqa: S106
    "byte fallback": (changed(model_byte_fallback=True), "got BPE with byte_fallback"),
    "dropout": (changed(model_dropout=0.5), "model.dropout: expected none, got 0.5"),
    "suffix": (changed(model_end_of_word_suffix="</w>"), 'end_of_word_suffix: expected none, got "</w>"'),
    "normalizer": (changed(normalizer=NFC), "normalizer: expected none, got NFC; it changes texts"),
    "decoder": (changed(decoder=None), "decoder: expected ByteLevel, got none"),
    "no pattern": (changed(pre_tokenizer=None), "pre_tokenizer: expected Splits and ByteLevel, got none"),
    "whitespace": (another_cut(pre_tokenizers.Whitespace()), "got Whitespace"),
    "prefix": (another_cut(pre_tokenizers.ByteLevel()), "expected add_prefix_space = false, got true"),
    "merged": (
        another_cut(cut_by(r"\s", behavior="merged_with_next")),
        "expected matches as pieces, Isolated, got MergedWithNext",
    ),
    **{
        f"several patterns: {name}": (another_cut(cut_by(*patterns)), "pre_tokenizer: expected Splits of which all but")
        for name, patterns in {
            "not a class": (r"\s?\p{L}+", r"\s+"),
            "classes that overlap": (r"\p{L}+", "[a-z]+", r"\s+"),
            "three of a class that are cut again": (r"\p{N}{1,3}", r"\p{N}|\s+"),
            "a line's end": (r"\p{N}+", r"\s+$"),
            "what is before": (r"\p{N}+", r"(?<=a)b"),
        }.items()
    },
    "a text": (
        another_cut(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
        ),
        "expected a regular expression, got the text",
    ),
    "letters": (changed(model_vocab={"a": 0, "€": 1}, model_merges=[]), 'letters of ByteLevel, got "\\u20ac"'),
    "a byte": (changed(model_vocab={"a": 0}, model_merges=[]), "a token of every byte, got none of 255 of them"),
    "ids": (a_gap, "expected the ids of texts from 0 on without a gap, special ones behind, got 3 in the place of 0"),
    "order": (another_order, "expected merges in the order of their ids"),
    "unmerged": (an_unmerged_token, "expected every token to be what its bytes are merged to"),
    "blanks": (blanks, "expected the same tokens from tokenizer.json, got others for a text of"),
    "moved": (moved, 'expected "</s>" as 1300, which the file says, got 1201'),
    "no tokenizer": (changed(model={"type": "?"}), "expected a tokenizer that `tokenizers` loads"),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> str:
    return learnt(cut_by(LLAMA)).to_str()


@pytest.mark.parametrize("name", BAD)
def test_another_kind_of_tokenizer_is_refused(
    name: str, right: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line a problem, exit code 2, nothing kept."""
    change, expected = BAD[name]
    monkeypatch.setenv("NMOE_HOME", str(tmp_path / "home"))
    said = json.loads(right)
    change(said)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(said))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert main(["data", "tokenizer", "add", "theirs", "--from", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"nmoe: {file}: ") for line in lines)
    assert any(expected in line for line in lines), lines
    assert not (tmp_path / "home").exists()


def test_data_is_prepared_with_a_published_one(
    right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "tokenizer.json").write_text(right)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert main(["data", "tokenizer", "add", "theirs", "--from", str(tmp_path)]) == 0
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} the cat sat on the mat\n")
    out = tmp_path / "data"
    assert main(["data", "prep", str(tmp_path / "texts"), str(out), "--tokenizer", "theirs", "--workers=1"]) == 0
    theirs = Theirs.from_str(right)
    tokens = np.load(out / "train" / "shard-00000.npy").tolist()
    (first, *_) = " ".join(map(str, tokens)).split(" 1201 ")
    assert theirs.decode(list(map(int, first.split()))).endswith(" the cat sat on the mat\n")
