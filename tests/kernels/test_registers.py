"""Registers of products under way: what the reader of SASS finds, and what it leaves alone."""

from __future__ import annotations

import pytest

from tests.kernels.registers import overwritten

SCORES = "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR40], RZ, !UPT, gsb0"
SUM = "HGMMA.64x128x16.F32.BF16 R88, R184, gdesc[UR8].tnspB, R88, gsb0"
ALL, ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def text(*lines: str) -> str:
    """As cuobjdump prints it."""
    return "\n".join(f"        /*{16 * place:04x}*/                   {line} ;" for place, line in enumerate(lines))


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((SUM, ALL, "FADD R184, R1, R2"), []),
        ((SUM, "FADD R184, R1, R2", ALL), ["0x10 FADD R184, R1, R2"]),
        ((SUM, "@P0 FMUL R187, R1, R2", ALL), ["0x10 FMUL R187, R1, R2"]),
        ((SUM, "FADD R188, R1, R2", ALL), []),
        ((SUM, "FADD R151, R1, R2", ALL), ["0x10 FADD R151, R1, R2"]),  # the last register of the sum
        ((SUM, "FADD R152, R1, R2", ALL), []),
        ((SUM, "FADD R1, R184, R88", ALL), []),  # what is read is a compiler's concern
        ((SUM, SCORES, ONE, "FADD R184, R1, R2", ALL), []),  # the older one is over
        ((SCORES, SUM, ONE, "FADD R184, R1, R2", ALL), ["0x30 FADD R184, R1, R2"]),
        ((SCORES, SUM, ONE, "FADD R56, R1, R2", ALL), []),
        ((SUM, "LDG.E.128 R181, desc[UR4][R2.64]", ALL), ["0x10 LDG.E.128 R181, desc[UR4][R2.64]"]),
        ((SUM, "LDSM.16.M88.4 R180, [R3+UR11]", ALL), []),
        ((SUM, "STG.E.128 desc[UR4][R2.64], R184", ALL), []),
        # a loop that waits at its beginning for what the turn before began
        (("MOV R9, R8", ALL, "FADD R184, R1, R2", SUM, "@P0 BRA 0x10", ALL), []),
        (("MOV R9, R8", "FADD R184, R1, R2", ALL, SUM, "@P0 BRA 0x10", ALL), ["0x10 FADD R184, R1, R2"]),
    ],
)
def test_what_is_written_while_a_product_has_it(lines: tuple[str, ...], found: list[str]) -> None:
    assert overwritten(text(*lines)) == found
