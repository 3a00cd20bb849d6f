"""Our tokenizers as `tokenizer.json` of Hugging Face: the same tokens, loaded by `transformers`."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

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
