"""Rotations and their table."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

from nmoe.config.sections import Mla, Yarn
from nmoe.pure.model import hf
from nmoe.pure.model.attention.mla import scale
from nmoe.pure.model.rope import Rope, rotate, table
from tests import shapes

YARN = Yarn(factor=8.0, original_positions=64, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.3)
TABLE = table(64, 8, theta=100.0, yarn=None)


def double(rope: Rope) -> Rope:
    """The table's values in fp64."""
    return Rope(rope.cos.double(), rope.sin.double())


def test_neighbours_are_turned_by_position_times_frequency() -> None:
    x = torch.zeros(1, 3, 4, dtype=torch.float64)
    x[..., 0], x[..., 3] = 1.0, 2.0
    turned = rotate(x, double(table(3, 4, theta=100.0, yarn=None)))
    for position in range(3):
        fast, slow = position, position / 10
        expected = [math.cos(fast), math.sin(fast), -2 * math.sin(slow), 2 * math.cos(slow)]
        assert turned[0, position].tolist() == pytest.approx(expected, abs=1e-7)


@given(st.integers(0, 2**32 - 1))
def test_norms_of_pairs_are_kept(seed: int) -> None:
    x = torch.randn(2, 16, 3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before, after = (each.unflatten(-1, (4, 2)).norm(dim=-1) for each in (x, rotate(x, double(TABLE))))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("yarn", [None, attrs.evolve(YARN, mscale=1.3)])
def test_products_depend_on_the_distance_only(yarn: Yarn | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    rope = double(table(64, 8, theta=100.0, yarn=yarn))
    turned_q, turned_k = (rotate(each.expand(1, 64, 8), rope)[0] for each in (q, k))
    products = turned_q @ turned_k.T
    for distance in range(-63, 64):
        diagonal = products.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5
    first_row = products[0]
    assert (first_row[1:] - first_row[:-1]).abs().min() > 1e-4


def test_one_head_or_many_are_turned_alike() -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    on_all_ranks = rotate(x, TABLE)
    for head in range(3):
        assert torch.equal(rotate(x[:, :, head], TABLE), on_all_ranks[:, :, head])


def test_low_precision_is_rounded_once() -> None:
    """Turned in fp32: off by no more than the last rounding."""
    x = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, TABLE)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), TABLE).bfloat16())


CASES = {
    "plain": shapes.config(attention=shapes.attention(qk_rope_head_dim=16)),
    "ramp": shapes.config(
        max_positions=512, attention=shapes.attention(yarn=YARN, qk_rope_head_dim=8, rope_theta=100.0)
    ),
    "DeepSeek-V3": shapes.config(
        max_positions=163840,
        attention=shapes.attention(qk_rope_head_dim=64, yarn=Yarn(factor=40.0, original_positions=4096)),
    ),
    "nothing kept": shapes.config(
        max_positions=128, attention=shapes.attention(qk_rope_head_dim=32, yarn=Yarn(factor=4.0, original_positions=32))
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scalings_are_transformers(name: str) -> None:
    """Theirs are computed in fp32, hence 1e-6; read off our table at position 1, where angle is frequency."""
    c = CASES[name]
    assert isinstance(c.attention, Mla)
    config = DeepseekV3Config(**hf.settings(c))
    if c.attention.yarn is None:
        frequency, scaling = DeepseekV3RotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequency, scaling = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert isinstance(c.attention, Mla)
    ours = table(2, c.attention.qk_rope_head_dim, theta=c.attention.rope_theta, yarn=c.attention.yarn)
    torch.testing.assert_close(torch.atan2(ours.sin[1], ours.cos[1]), frequency, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.hypot(ours.sin, ours.cos), torch.full_like(ours.sin, scaling), rtol=1e-6, atol=0)

    channels = c.attention.qk_nope_head_dim + c.attention.qk_rope_head_dim
    assert scale(c.attention) == pytest.approx(yarn_apply_mscale(config.rope_parameters, channels**-0.5), rel=1e-12)


def test_the_ramp_case_has_a_ramp() -> None:
    """One frequency kept, one divided, the others between: else the case above proves little."""
    plain, extended = (table(2, 8, theta=100.0, yarn=yarn) for yarn in (None, YARN))
    ratio = torch.atan2(plain.sin[1], plain.cos[1]) / torch.atan2(extended.sin[1], extended.cos[1])
    assert ratio[0].item() == pytest.approx(1)
    assert ratio[-1].item() == pytest.approx(8)
    assert ((ratio[1:-1] > 1.01) & (ratio[1:-1] < 7.9)).all()


def test_far_positions_are_exact() -> None:
    """Angles in fp64: at position 163839 an fp32 angle is off by up to 0.008."""
    rope = table(163840, 64, theta=10000.0, yarn=None)
    assert rope.cos[163839, 0].item() == pytest.approx(math.cos(163839), abs=1e-7)
    assert rope.sin[163839, 1].item() == pytest.approx(math.sin(163839 * 10000 ** (-1 / 32)), abs=1e-7)
