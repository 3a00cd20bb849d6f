"""Several `Split`s of a tokenizer.json, one after another, as one pattern that cuts the same pieces.

`tokenizers` applies a pattern to each piece of the pattern before: pieces end where a class of characters begins, and
look-ahead ends there too. One pattern does the same where every pattern but the last is one class of characters,
repeated, and the classes are apart: of each class, and of what is in none, the characters are then matched by branches
of their own, in which every character of the last pattern is narrowed to the class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

CUTTER = re.compile(r"(?P<times>\+|\{1,\d+\}|)")
GROUP = re.compile(r"\((?:\?(?:[:=!>]|[imsx]+:))?|\)|\||[*+?][+?]?|\{\d+(?:,\d*)?\}[+?]?")
ESCAPE = re.compile(r"\\[pP](?:\{\^?\w+\}|\w)|\\x\{[0-9a-fA-F]+\}|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.")
ANCHORS = ("\\b", "\\B", "\\A", "\\z", "\\Z", "\\G", "\\R", "\\X", "\\K", *(f"\\{digit}" for digit in range(1, 10)))
EVERY = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))


def joined(patterns: Sequence[str]) -> str | None:
    """One pattern for several, each `Isolated`; None where it cannot be shown to cut the same pieces."""
    *cutters, last = patterns
    parsed = _parts(last)
    classes = [_cutter(pattern) for pattern in cutters]
    if parsed is None or None in classes:
        return None
    branches: list[str] = []
    before = ""
    for atom, times in filter(None, classes):
        if _matched(atom, before):
            return None
        inside = _matched(atom, EVERY)
        before += inside
        if _matches_nothing(parsed, inside):
            branches.append(atom + times)
        elif times == "+":
            branches += _within(parsed, atom)
        else:
            return None
    none_of = f"[^{''.join(atom for atom, _ in filter(None, classes))}]"
    return "|".join((*branches, *_within(parsed, none_of)))


Parts = list[tuple[str, bool]]
"""A pattern cut up; of each part, whether it is what one character has to be."""


def _parts(pattern: str) -> Parts | None:
    """None for a pattern with anchors, backreferences and the like."""
    parts: Parts = []
    at = 0
    while at < len(pattern):
        if group := GROUP.match(pattern, at):
            text, is_atom = group[0], False
        elif pattern[at] == "[":
            text, is_atom = _bracket(pattern, at), True
        elif escape := ESCAPE.match(pattern, at):
            text, is_atom = escape[0], True
        else:
            text, is_atom = pattern[at], True
        if not text or text in ("^", "$", *ANCHORS) or pattern.startswith("(?", at) and len(text) < 3:
            return None
        parts.append((text, is_atom))
        at += len(text)
    return parts


def _bracket(pattern: str, begin: int) -> str:
    """The class that begins there; an empty text where it does not end."""
    depth, at = 0, begin
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
            if not depth:
                return pattern[begin : at + 1]
        at += 1
    return ""


def _cutter(pattern: str) -> tuple[str, str] | None:
    """Class and repetition of a pattern that is one class of characters."""
    parts = _parts(pattern)
    if not parts or not parts[0][1] or any(is_atom for _, is_atom in parts[1:]):
        return None
    times = CUTTER.fullmatch("".join(text for text, _ in parts[1:]))
    return (parts[0][0], times["times"]) if times else None


def _matched(atom: str, letters: str) -> str:
    """Those of some characters that an atom matches, by their engine."""
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Split(Regex(f"(?:{atom})+"), "removed", invert=True)
    return "".join(piece for piece, _ in cut.pre_tokenize_str(letters))


def _matches_nothing(parts: Parts, inside: str) -> bool:
    """Whether every branch wants a character that is not `inside`; False where that is not seen at once."""
    wants, depth = False, 0
    for (text, is_atom), (after, _) in zip(parts, (*parts[1:], ("", False)), strict=True):
        if text.startswith("("):
            depth += 1
        elif text == ")":
            depth -= 1
        elif text == "|" and not depth:
            if not wants:
                return False
            wants = False
        elif is_atom and not depth and not after.startswith(("?", "*", "{0")):
            wants = wants or not _matched(text, inside)
    return wants


def _within(parts: Parts, atom: str) -> tuple[str, str]:
    """The pattern over the characters of a class alone, and what it leaves out of them."""
    narrow = partial(_narrowed, atom)
    own = "".join(narrow(text) if is_atom else text for text, is_atom in parts)
    return f"(?:{own})", f"(?:(?!{own}){atom})+"


def _narrowed(atom: str, text: str) -> str:
    given: Any = r"[^\n]" if text == "." else text
    return f"[{given}&&{atom}]"
