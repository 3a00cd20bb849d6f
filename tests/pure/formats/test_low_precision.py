"""fp8, MXFP8 and NVFP4: bit for bit what torchao makes, exact properties, and values that are hard for a format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmoe.pure.core.key import Key
from nmoe.pure.formats import e4m3, mxfp8, nvfp4
from nmoe.pure.formats import random as draws
from tests.pure.formats.vectors import SIGNS, digest, inputs, uniform

TORCHAO = json.loads(Path(__file__).with_name("torchao.json").read_text())
DIGESTS = TORCHAO["digests"]

DIFFER = {
    # torchao divides zero by zero
    "zeros": ("nvfp4 codes", "nvfp4 scales", "nvfp4 factor"),
    # torchao's reciprocal of a factor and a scale is infinite, and every code 6
    "beside the smallest scale": ("nvfp4 codes", "nvfp4 scales", "nvfp4 factor"),
    # on a CPU torchao rounds log2(x) before it rounds up: within 2**-19 above a power of two the scale is half as large
    "just above powers of two": ("mxfp8 codes", "mxfp8 exponents"),
}
"""Where the form of a format is ours: tests of their own hold it."""


def ours(x: Tensor) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    made |= zip(("e4m3 codes", "e4m3 scales"), e4m3.quantise(x), strict=True)
    made |= zip(("mxfp8 codes", "mxfp8 exponents"), mxfp8.quantise(x), strict=True)
    packed, scale, factor = nvfp4.quantise(x)
    made |= {"nvfp4 codes": packed, "nvfp4 scales": scale, "nvfp4 factor": factor.view(1)}
    if len(x) % 128 == 0:
        made |= zip(("e4m3 weight codes", "e4m3 weight scales"), e4m3.quantise(x, rows=128), strict=True)
    return made


@pytest.mark.parametrize("name", inputs())
def test_codes_and_scales_are_torchaos_bit_for_bit(name: str) -> None:
    made = ours(inputs()[name])
    assert made.keys() == DIGESTS[name].keys()
    other = {part for part, y in made.items() if digest(y) != DIGESTS[name][part]}
    assert other == set(DIFFER.get(name, ()))


def roundings() -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Values as each format holds them, and how many columns share a scale."""
    return {
        "e4m3": (lambda x: e4m3.dequantise(*e4m3.quantise(x)), 128),
        "e4m3 weight": (lambda x: e4m3.dequantise(*e4m3.quantise(x, rows=128), rows=128), 128),
        "mxfp8": (lambda x: mxfp8.dequantise(*mxfp8.quantise(x)), 32),
        "nvfp4": (lambda x: nvfp4.dequantise(*nvfp4.quantise(x)), 16),
        "nvfp4 weight": (lambda x: nvfp4.dequantise(*nvfp4.quantise(x, rows=16), rows=16), 16),
    }


FORMATS = tuple(roundings())


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-25, 60), spread=st.integers(0, 12))
def test_rounding_is_close_odd_and_blind_to_powers_of_two(name: str, seed: int, exponent: int, spread: int) -> None:
    rounded, _ = roundings()[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 256, generator=generator) * torch.randn(128, 256, generator=generator).mul(spread / 4).exp2()
    y = rounded(x)
    block = 256 if name.startswith("nvfp4") else 128
    amax = x.abs().amax() if "weight" in name or block == 256 else x.abs().amax(-1, keepdim=True)
    # half a unit of the last place of a normal code, or half the smallest code at the scale of the largest block
    relative, smallest = (0.25, 1 / 12) if name.startswith("nvfp4") else (2**-4, 2**-10 / 224)
    bound = x.abs() * relative * 1.15 + amax * smallest
    assert ((y - x).abs() <= bound).all()
    assert torch.equal(rounded(-x), -y)
    assert torch.equal(rounded(x * 2.0**exponent), y * 2.0**exponent)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_value_that_is_not_finite_is_never_hidden(name: str, bad: float) -> None:
    rounded, block = roundings()[name]
    x = uniform(128, 256)
    x[3, 40] = bad
    y = rounded(x)
    assert y[3, 40 // block * block : 40 // block * block + block].isnan().all(), "its whole block"
    if not name.startswith("nvfp4"):
        assert y[:, 128:].isfinite().all(), "and no other"


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_all_codes_or_the_scale_are_nan_where_a_value_is_not_finite(bad: float) -> None:
    """In every code: not only once a code of 0 is multiplied by an infinite scale."""
    x = uniform(128, 256)
    x[3, 40] = bad
    for rows in (1, 128):
        codes, scale = e4m3.quantise(x, rows=rows)
        assert codes[3, :128].float().isnan().all() and scale[3 // rows, 0].isnan()
        assert codes[:, 128:].float().isfinite().all() and scale[:, 1].isfinite().all()
    codes, exponent = mxfp8.quantise(x)
    assert codes[3, 32:64].float().isnan().all() and exponent[3, 1] == 255 and (exponent == 255).sum() == 1
    for rows in (1, 16):
        assert nvfp4.quantise(x, rows=rows)[2].isnan(), "e2m1 has none itself"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 1e-30, 2e38])
def test_no_size_of_a_tensor_makes_anything_but_numbers(name: str, size: float) -> None:
    rounded, _ = roundings()[name]
    y = rounded(uniform(128, 256) * size)
    assert y.isfinite().all()
    assert y.abs().max() >= 1.9e38 if size > 1 else y.abs().max() <= 1e-29


def test_the_largest_of_a_block_is_448() -> None:
    for rows in (1, 128):
        codes, scale = e4m3.quantise(uniform(128, 256) * 7, rows=rows)
        blocks = codes.float().abs().view(128 // rows, rows, 2, 128)
        assert (blocks.amax((1, 3)) == 448).all() and scale.shape == (128 // rows, 2)


def test_mxfp8_never_saturates_and_wastes_less_than_a_bit() -> None:
    for name, x in inputs().items():
        if name == "zeros":
            continue
        _, exponent = mxfp8.quantise(x)
        amax = x.view(len(x), -1, 32).abs().amax(-1).double()
        held = 448.0 * torch.exp2(exponent.double() - 127)
        assert (amax <= held).all(), name
        # quotients are rounded to fp32 first
        least = held / 2 * (1 - 2.0**-23)
        assert ((amax >= least) | (exponent <= 1)).all(), name


@pytest.mark.parametrize("half", [1, 2, 3])
def test_mxfp8_of_a_quotient_just_above_a_power_of_two_rounds_up(half: int) -> None:
    """Of 448 * 2**k the exponent is k; a unit in the last place more makes it k + 1."""
    x = torch.zeros(1, 64)
    x[0, 0] = 448 * 2.0**half
    x[0, 32] = torch.nextafter(x[0, 0], torch.tensor(torch.inf)) * (1 + 2.0**-22)
    assert mxfp8.quantise(x)[1].tolist() == [[127 + half, 128 + half]]


def test_ties_go_to_the_even_code_in_both_directions() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nvfp4.decode(nvfp4.encode(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert nvfp4.decode(nvfp4.encode(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4]
    assert nvfp4.encode(torch.tensor([-0.1, 6.1, -7.0, 5.1])).tolist() == [8, 7, 15, 7]


def test_all_codes_of_e2m1_go_round_and_pack_with_the_first_in_the_low_half() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(nvfp4.encode(nvfp4.decode(codes)), codes)
    assert torch.equal(nvfp4.unpack(nvfp4.pack(codes)), codes)
    assert nvfp4.pack(codes)[:2].tolist() == [0x10, 0x32]


def test_a_weight_in_nvfp4_has_the_values_of_its_transpose() -> None:
    w = uniform(128, 256)
    ahead = nvfp4.dequantise(*nvfp4.quantise(w, rows=16), rows=16)
    across = nvfp4.dequantise(*nvfp4.quantise(w.T, rows=16), rows=16).T
    assert torch.equal(ahead, across)
    plain = nvfp4.dequantise(*nvfp4.quantise(w))
    assert not torch.equal(ahead, plain)


def test_blocks_of_16_x_16_are_rows_of_16_where_their_largest_values_agree() -> None:
    """Each row of a block gets the block's largest value: then torchao's form, which has rows alone, is the same."""
    w = uniform(32, 64).clamp(-0.9, 0.9)
    w[:, ::16] = torch.tensor([0.91, -0.95, 0.99, 0.93])
    one, two = nvfp4.quantise(w), nvfp4.quantise(w, rows=16)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1][::16].float(), two[1].float())


@settings(max_examples=30, deadline=None)
@given(value=st.floats(-6.5, 6.5, width=32))
def test_stochastic_rounding_is_right_on_average_and_goes_to_a_neighbour(value: float) -> None:
    noise = draws.noise(Key(1), torch.tensor(7), (1 << 14,))
    made = nvfp4.decode(nvfp4.encode(torch.full_like(noise, value), noise))
    wanted = min(max(value, -6.0), 6.0)
    grid = sorted(nvfp4.decode(torch.arange(16, dtype=torch.uint8)).tolist())
    below, above = max(g for g in grid if g <= wanted), min(g for g in grid if g >= wanted)
    assert set(made.tolist()) <= {below, above}
    assert abs(made.double().mean().item() - wanted) <= 6 * (above - below) / 2 / 2**7 + 1e-6
    nothing = nvfp4.encode(torch.tensor([value]), torch.tensor([1 - 2.0**-24]))
    assert abs(nvfp4.decode(nothing).item()) <= abs(wanted)


def test_what_e2m1_holds_stays_under_any_noise() -> None:
    values = nvfp4.decode(torch.arange(16, dtype=torch.uint8))
    for noise in (0.0, 1 - 2.0**-24):
        assert torch.equal(nvfp4.encode(values, torch.full_like(values, noise)), torch.arange(16, dtype=torch.uint8))


class Wide(Key):
    """A key whose seed differs from `Key`'s above 32 bits alone."""

    def seed(self) -> int:
        return super().seed() ^ (1 << 40)


def test_noise_is_even_and_depends_on_key_salt_and_place_alone() -> None:
    shape, seven = (256, 256), torch.tensor(7)
    one = draws.noise(Key(1), seven, shape)
    assert torch.equal(one, draws.noise(Key(1), seven, shape))
    assert torch.equal(one[:3], draws.noise(Key(1), seven, (3, 256)))
    others = [draws.noise(Key(2), seven, shape), draws.noise(Key(1), torch.tensor(8), shape)]
    others.append(draws.noise(Key(1), seven + (1 << 32), shape))
    others.append(draws.noise(Wide(1), seven, shape))
    others.append(one.roll(1))
    for other in others:
        together = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert abs(together) < 0.02
    share = one.flatten().histc(64, 0, 1) / one.numel() * 64
    assert 0 <= one.min() and one.max() < 1 and (share - 1).abs().max() < 0.15
    assert torch.equal(one * 2**24, (one * 2**24).round())


def test_noise_is_the_hash_that_its_source_writes() -> None:
    """By Python's integers; the bits of every NVFP4 training hang on it."""

    def mixed(word: int) -> int:
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        return word ^ word >> 16

    for key, salt in ((Key(1), 7), (Key(2).fold("a"), -(1 << 40) + 3)):
        word = 0
        for half in (0, 32):
            word = mixed(word ^ (salt >> half) % 2**32 ^ (key.seed() >> half) % 2**32)
        wanted = [(mixed(mixed(word) ^ place) >> 8) / 2**24 for place in range(35)]
        assert draws.noise(key, torch.tensor(salt), (5, 7)).flatten().tolist() == wanted


def test_the_salt_differs_with_a_bit_of_the_tensor() -> None:
    x = uniform(4, 8)
    other = x.clone()
    other[1, 2] = torch.nextafter(x[1, 2], torch.tensor(torch.inf))
    assert draws.salt(x) != draws.salt(other) and draws.salt(x).dtype is torch.int64


def test_the_rotation_is_orthogonal_and_shares_out_an_outlier() -> None:
    sign = draws.signs(Key(3), torch.zeros(1))
    assert set(sign.tolist()) == {-1.0, 1.0}
    a, b = uniform(5, 64), uniform(7, 64)
    whole = draws.hadamard(torch.eye(16), sign)
    torch.testing.assert_close(whole @ whole.T, torch.eye(16))
    assert torch.equal(whole.abs(), torch.full((16, 16), 0.25)), "every value reaches every place"
    torch.testing.assert_close(draws.hadamard(a, sign) @ draws.hadamard(b, sign).T, a @ b.T)
    outlier = torch.zeros(1, 16)
    outlier[0, 5] = 100
    assert draws.hadamard(outlier, sign).abs().unique().tolist() == [25]


def test_the_matrix_of_the_rotation_is_torchaos() -> None:
    assert digest(draws.hadamard(torch.eye(16), torch.tensor(SIGNS))) == TORCHAO["rotation"]


def test_the_matrix_of_the_rotation_is_sylvesters() -> None:
    rows = torch.arange(16)
    parity = torch.tensor([[bin(int(i & j)).count("1") % 2 for j in rows] for i in rows])
    assert torch.equal(draws.hadamard(torch.eye(16), torch.ones(16)), (1 - 2 * parity) / 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: e4m3.quantise(torch.ones(4, 130)), "e4m3.quantise: expected blocks of 128 .* the 130 columns"),
        (lambda: e4m3.quantise(torch.ones(130, 128), rows=128), "e4m3.quantise: expected blocks .* the 130 rows"),
        (lambda: mxfp8.quantise(torch.ones(4, 48)), "mxfp8.quantise: expected blocks of 32 .* the 48 columns"),
        (lambda: nvfp4.quantise(torch.ones(4, 24)), "nvfp4.quantise: expected blocks of 16 .* the 24 columns"),
        (lambda: nvfp4.quantise(torch.ones(4, 32), rows=16), "nvfp4.quantise: expected blocks .* the 4 rows"),
        (lambda: draws.hadamard(torch.ones(4, 24), torch.ones(16)), "hadamard: expected blocks of 16"),
    ],
)
def test_other_sizes_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_scales_of_another_shape_are_refused() -> None:
    codes, scale = e4m3.quantise(torch.ones(4, 256))
    with pytest.raises(ValueError, match="e4m3.dequantise: expected scales"):
        e4m3.dequantise(codes, scale.T)
    codes, exponent = mxfp8.quantise(torch.ones(4, 64))
    with pytest.raises(ValueError, match="mxfp8.dequantise: expected exponents"):
        mxfp8.dequantise(codes, exponent.T)
    packed, scale, factor = nvfp4.quantise(torch.ones(4, 32))
    with pytest.raises(ValueError, match="nvfp4.dequantise: expected scales"):
        nvfp4.dequantise(packed, scale.T, factor)
