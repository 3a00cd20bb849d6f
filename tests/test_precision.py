"""What a config says of number formats: refused in one line before anything is allocated, and seen in the plan."""

from __future__ import annotations

import re

import attrs
import pytest

from nmoe.config import Config, identity, load_valid
from nmoe.pure.cost.machines import H200
from nmoe.pure.cost.plan import emulation_bytes, fp8_bytes, plan
from nmoe.pure.cost.report import render
from nmoe.pure.cost.scale import Arrangement, scale
from nmoe.pure.model.blueprint import make_blueprint
from tests.configs import ROOT, problems

QUICKSTART = ROOT / "configs" / "quickstart.toml"
FITTING = ("--model.moe.intermediate_size=128", "--precision.emulate=true")
ON_GPU = ("--run.device=cuda", *FITTING)


def config(*overrides: str) -> Config:
    return load_valid(QUICKSTART, {}, overrides, None).config


@pytest.mark.parametrize("compute", ["fp8", "mxfp8", "nvfp4"])
def test_every_format_is_emulated_on_a_cpu(compute: str) -> None:
    assert problems(QUICKSTART, f"--precision.compute={compute}", *FITTING, valid=True) == []


@pytest.mark.parametrize("ranks", [(), ("--parallel.ranks=2", "--train.microbatch_size=8")])
def test_a_gpu_has_kernels_for_fp8_and_so_have_several(ranks: tuple[str, ...]) -> None:
    assert problems(QUICKSTART, "--precision.compute=fp8", "--run.device=cuda", FITTING[0], *ranks, valid=True) == []


def test_the_plan_counts_codes_that_cross() -> None:
    """Tokens of 128 in the forward pass: a byte each and a scale, in whole cache lines; bf16 in the backward pass."""
    arguments = (FITTING[0], "--model.hidden_size=256", "--run.device=cuda", "--train.microbatch_size=8")
    low, wide = (config(f"--precision.compute={name}", *arguments) for name in ("fp8", "bf16"))
    a = Arrangement(gpus=2, hosts=1, expert_ranks=2, dedup=True, capacity=2.0)
    narrow, before = (scale(c, a, H200, mfu=0.4) for c in (low, wide))
    assert narrow.dispatch.inside == pytest.approx(before.dispatch.inside * 384 / 512)
    assert narrow.again == before.again and narrow.combine == before.combine
    assert before.again.inside == 2 * before.dispatch.inside and narrow.exchange_s < before.exchange_s
    experts = low.model.moe.num_experts // 2 * 3 * 256 * 128
    assert narrow.plan.memory.activations - before.plan.memory.activations > experts, "codes of the weights"
    assert narrow.plan.arena is not None and narrow.plan.arena.size == before.plan.arena.size  # pyright: ignore


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--precision.compute=fp4", *FITTING), r'precision.compute: expected one of .*"nvfp4", got "fp4"'),
        (
            ("--precision.compute=fp8", FITTING[0]),
            r'precision.emulate: expected true when precision.compute is "fp8", got false; .*run.device = "cpu"',
        ),
        (
            ("--precision.compute=nvfp4", "--run.device=cuda", FITTING[0]),
            r'precision.emulate: expected true when precision.compute is "nvfp4", got false; .*run.device = "cuda"',
        ),
        (
            ("--precision.compute=fp8", *ON_GPU),
            r'precision.emulate: expected false when precision.compute is "fp8" on a GPU, got true',
        ),
        (
            ("--precision.compute=fp8", "--run.device=cuda", "--run.kernels=torch", FITTING[0]),
            r'precision.compute: expected "bf16", "mxfp8" or "nvfp4" when run.kernels is "torch", got "fp8"',
        ),
        (
            ("--precision.compute=bf16", "--precision.emulate=true"),
            r'precision.emulate: expected false when precision.compute is "bf16", got true',
        ),
        (
            ("--precision.compute=mxfp8", "--precision.emulate=true"),
            r'model.moe.intermediate_size: expected a multiple of 128 when .* is "mxfp8", got 96; write 128',
        ),
        (
            ("--precision.compute=mxfp8", *FITTING, "--model.hidden_size=160"),
            r'model.hidden_size: expected a multiple of 128 when precision.compute is "mxfp8", got 160; write 256',
        ),
        (
            ("--precision.compute=fp8", *FITTING, "--model.moe.intermediate_size=192"),
            r'model.moe.intermediate_size: expected a multiple of 128 when .* is "fp8", got 192; write 256',
        ),
        (
            ("--precision.compute=nvfp4", *FITTING, "--model.num_dense_layers=4", "--model.num_layers=4"),
            r'precision.compute: expected "bf16" for a model without experts, got "nvfp4"',
        ),
        (
            ("--precision.compute=mxfp8", *ON_GPU, "--parallel.ranks=2", "--train.microbatch_size=8"),
            r'parallel.experts: expected 1 when precision.compute is "mxfp8", got 2',
        ),
    ],
)
def test_what_cannot_be_computed_is_said_in_one_line(overrides: tuple[str, ...], message: str) -> None:
    found = problems(QUICKSTART, *overrides, valid=True)
    assert len(found) == 1 and re.search(message, found[0]), found


def test_emulation_does_not_make_another_run_and_the_format_does() -> None:
    low = config("--precision.compute=nvfp4", *FITTING)
    native = attrs.evolve(low, precision=attrs.evolve(low.precision, emulate=False))
    other = attrs.evolve(low, precision=attrs.evolve(low.precision, compute="mxfp8"))
    assert identity(low) == identity(native) != identity(other)


def test_the_plan_says_what_is_multiplied_in_fewer_bits() -> None:
    low, wide = config("--precision.compute=fp8", *FITTING), config("--precision.compute=bf16", FITTING[0])
    planned, before = (plan(c, make_blueprint(c), mfu=0.4) for c in (low, wide))
    assert planned.lowered == planned.flops.routed + planned.flops.shared > planned.flops.routed
    assert planned.memory.activations > before.memory.activations, "rounded operands"
    share = 100 * planned.lowered / planned.flops.total()
    assert f"precision      fp8 in {share:.1f} % of the FLOPs, the experts; bf16 elsewhere, emulated" in render(
        low, planned
    )
    assert "precision" not in render(wide, before) and "emulated" not in render(wide, before)
    assert render(low, planned).endswith("FLOP in all, as in bf16: emulated products take longer")


def test_codes_and_rounded_operands_are_those_of_routed_or_of_shared_experts_whichever_are_more() -> None:
    """By hand, of 4 experts of width 128 and hidden size 128, 10 rows for 10 tokens."""
    dims, room = {"D": 128, "F": 128, "S": 0, "E": 4}, {"tokens": 10, "rows": 10, "expert_ranks": 1}
    routed = 4 * 3 * 128 * 128 + 10 * 128 + 10 * 256
    assert fp8_bytes(dims, landing=10, **room) == routed
    assert fp8_bytes(dims | {"S": 256}, landing=10, **room) == routed
    assert fp8_bytes(dims | {"S": 1024}, landing=10, **room) == 3 * 128 * 1024 + 10 * 128 + 10 * 2048
    assert emulation_bytes(dims | {"S": 256}, **room, noisy=False) == 16 * (4 * 128 * 256 + 10 * (128 + 256))
    most = 128 * 2048 + 10 * (128 + 2048)
    assert [emulation_bytes(dims | {"S": 1024}, **room, noisy=noisy) for noisy in (False, True)] == [
        16 * most,
        32 * most,
    ]
