"""Registers of a product that is under way, and written meanwhile, found in the SASS of sm_90.

A product (HGMMA and its kin) reads the registers of its left operand, and writes those of its sum, until a wait for it
(WARPGROUP.DEPBAR) is over. ptxas, of Triton 3.6 and 3.7 alike, may give the left operand's registers to other values as
soon as the product is begun, and a wait that takes the operand names no registers to it: a kernel's gradients had an
error of 7 % and NaN for it, other ones each time (docs/log.md, 2026-11-30).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*(\S+)\s*(.*?)\s*;", re.MULTILINE)


@attrs.frozen
class Instruction:
    """One line of SASS."""

    address: int
    name: str
    operands: tuple[str, ...]

    def written(self) -> set[int]:
        """Registers of a thread that it writes; products have theirs in `touched`."""
        if "GMMA" in self.name or not self.operands:
            return set()
        wide = re.search(r"\.(64|128)\b", self.name)
        matrices = re.search(r"^LDSM.*\.(\d)$", self.name)
        count = int(wide[1]) // 32 if wide else int(matrices[1]) if matrices else 2 if ".WIDE" in self.name else 1
        return registers(self.operands[0], count)

    def touched(self) -> set[int]:
        """Registers that a product has until it is waited for: its sum's, and its left operand's if that has any."""
        columns = re.match(r"[HQIB]GMMA\.64x(\d+)x", self.name)
        if columns is None:
            return set()
        return registers(self.operands[0], int(columns[1]) // 2) | registers(self.operands[1], 4)


def registers(operand: str, count: int) -> set[int]:
    """So many from the named one on; none for a descriptor, or what reads as zero."""
    found = re.match(r"-?R(\d+)\b", operand)
    return set(range(int(found[1]), int(found[1]) + count)) if found else set()


def overwritten(sass: str) -> list[str]:
    """Instructions that write what a product under way has: in the order of the text, and in each loop from one turn to
    the next."""
    program = [
        Instruction(int(address, 16), name, tuple(each.strip() for each in rest.split(",")) if rest else ())
        for address, name, rest in INSTRUCTION.findall(sass)
    ]
    at = {each.address: place for place, each in enumerate(program)}
    found = walk(program)
    for place, each in enumerate(program):
        target = re.search(r"0x([0-9a-f]+)$", each.operands[-1]) if each.name.startswith("BRA") else None
        first = at.get(int(target[1], 16)) if target else None
        if first is not None and first < place:
            body = program[first : place + 1]
            if any("GMMA" in other.name for other in body):
                found |= walk([*body, *body])
    return [found[address] for address in sorted(found)]


def walk(path: Iterable[Instruction]) -> dict[int, str]:
    """Address and text of what writes a register under way, on a path."""
    groups: list[set[int]] = []
    begun: set[int] = set()
    found: dict[int, str] = {}
    for each in path:
        if "GMMA" in each.name:
            begun |= each.touched()
            if "gsb0" in each.operands:
                groups.append(begun)
                begun = set()
        elif each.name.startswith("WARPGROUP.DEPBAR"):
            left = int(each.operands[1], 16)
            groups = groups[max(0, len(groups) - left) :]
        elif each.written() & begun.union(*groups):
            found[each.address] = f"{each.address:#x} {each.name} {', '.join(each.operands)}"
    return found
