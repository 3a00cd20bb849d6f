"""What is done to a text, and what is asked of it, before it is tokenized."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
ORDINARY = re.compile(r"[\w\s]+")
WORD = re.compile(r"\w+")


def normalize(text: str, *, nfc: bool, control: bool) -> str:
    """The text, in normal form C if `nfc`, if `control` without control characters other than tab and line breaks."""
    if control and CONTROL.search(text):
        text = CONTROL.sub("", text)
    return unicodedata.normalize("NFC", text) if nfc else text


def drop_reason(text: str, *, min_chars: int, max_repetition: float, max_symbols: float) -> str | None:
    """Why a document is left out, or None.

    min_chars       fewest characters
    max_repetition  largest share of its characters that stand in lines it had before
    max_symbols     largest share of its characters that are neither word characters nor white space
    """
    if not text or text.isspace():
        return "empty"
    if len(text) < min_chars:
        return "short"
    if max_symbols < 1 and len(ORDINARY.sub("", text)) > max_symbols * len(text):
        return "symbols"
    if max_repetition < 1 and _repeated(text) > max_repetition * len(text):
        return "repetition"
    return None


def pieces(text: str, most: int) -> Iterator[str]:
    """The text in pieces of at most `most` characters, cut after a line break where there is one, else anywhere."""
    start = 0
    while len(text) - start > most:
        end = text.rfind("\n", start, start + most) + 1
        end = end if end > start else start + most
        yield text[start:end]
        start = end
    yield text[start:]


def settled(data: bytes, stops: Sequence[str], *, final: bool) -> tuple[str, bool]:
    """The text of some bytes as far as bytes to come cannot change it, and whether a stop text has ended it.

    stops  none empty; the text ends before the first of them. What may be the beginning of one is held back.
    final  no more bytes come
    """
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, final)
    ends = [text.index(stop) for stop in stops if stop in text]
    if ends:
        return text[: min(ends)], True
    begun = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return text[: len(text) - (0 if final else max(begun, default=0))], False


def shingles(text: str, words: int) -> Iterator[str]:
    """Every run of `words` words of the text, in lower case, words alone; a shorter text is one shingle.

    A text without a word has none: by an empty one all such texts, of signs or emoji, would equal each other.
    """
    in_order = WORD.findall(text.lower())
    for start in range(max(1, len(in_order) - words + 1) if in_order else 0):
        yield " ".join(in_order[start : start + words])


def _repeated(text: str) -> int:
    """Characters in lines that occurred before."""
    counts = Counter(line for line in text.split("\n") if line.strip())
    return sum(len(line) * (count - 1) for line, count in counts.items())
