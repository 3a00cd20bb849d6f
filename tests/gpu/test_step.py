"""The step on a GPU: it learns, it never waits for the device, and it does the same thing twice."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.bench import kernels as kernel_bench
from nmoe.bench.kernels import moe, optimizer
from nmoe.config.sections import Config
from nmoe.effects.device import cpu, gpu, ops, process
from nmoe.effects.kernels.moe import moe as mixtures
from nmoe.effects.train.build import fresh
from nmoe.effects.train.step import Metrics, State, make_step
from nmoe.pure.core import tree
from nmoe.pure.model import experts, route
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch
from nmoe.pure.model.route import Routing
from tests.effects.train.tiny import tiny
from tests.kernels.exchange.nvshmem import experts_by_segment

pytestmark = [
    pytest.mark.gpu,
    # torch says of its own debug mode that it may miss some synchronisations; what it finds is an error here
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]


def config(compute: str = "bf16") -> Config:
    c = tiny(compute=compute, batch_size=8, microbatch_size=4, lr=3e-3, steps=50)
    # kernels read eight channels at once
    attention = attrs.evolve(c.model.attention, qk_rope_head_dim=8)
    return attrs.evolve(c, run=attrs.evolve(c.run, device="cuda"), model=attrs.evolve(c.model, attention=attention))


def batch(c: Config) -> Batch:
    """Counting modulo the vocabulary: learnable."""
    shape = (2, 4, c.train.sequence_length + 1)
    start = torch.arange(8).view(2, 4, 1) * 5
    tokens = ((start + torch.arange(shape[-1])) % c.model.vocab_size).cuda()
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), ())


def train(c: Config, steps: int, mode: str | int = "default") -> tuple[State, list[Metrics]]:
    rt = process.Runtime(device=gpu.device("cuda"), rank=0, world=1, peak_flops=1.0)
    blueprint = make_blueprint(c)
    state, env = fresh(c, blueprint, rt)
    step = make_step(c, blueprint, env, rt, mark=lambda name: None)
    data = batch(c)
    state, first = step(state, data)  # libraries initialise, and may wait, in the first step
    found = [first]
    torch.cuda.set_sync_debug_mode(mode)
    try:
        for _ in range(steps - 1):
            state, metrics = step(state, data)
            found.append(metrics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return state, found


def test_a_step_never_waits_for_the_device_and_learns() -> None:
    _, found = train(config(), 40, mode="error")
    losses = [each.loss.item() for each in found]
    assert losses[-1] < 0.5 * losses[0], losses
    assert int(found[-1].skipped) == 0


def test_the_same_steps_twice_are_bitwise_the_same() -> None:
    one, first = train(config(), 10)
    two, second = train(config(), 10)
    assert [each.loss.item() for each in first] == [each.loss.item() for each in second]
    for (path, a), (_, b) in zip(tree.leaves(one.params), tree.leaves(two.params), strict=True):
        assert torch.equal(a, b), path


def test_a_mixture_with_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements in the rows: the last tokens become what they become alone, to the bit."""
    tokens, hidden, width, num_experts, top_k, last = 180_000, 2048, 64, 16, 6, 300
    generator = torch.Generator("cuda").manual_seed(2)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return drawn.requires_grad_()

    x, grad_output = normal(tokens, hidden), normal(tokens, hidden).detach()
    up, down = normal(num_experts, hidden, 2, width), normal(num_experts, width, hidden)
    score = torch.rand(tokens, num_experts, generator=generator, device="cuda")
    expert = route.top_k(score, top_k)
    weight = score.gather(-1, expert).requires_grad_()
    assert expert.numel() * hidden > 2**31
    mixture = partial(mixtures.moe_experts, tiles=ops.mixture_tiles(torch.device("cuda"), hidden, width))

    def run(part: slice) -> list[Tensor]:
        leaves = [x[part].detach().requires_grad_(), weight[part].detach().requires_grad_()]
        y = mixture(leaves[0], Routing(expert[part], leaves[1]), up, down)[0]
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_output[part])]

    for name, whole, alone in zip(
        ("y", "dx", "dweight"), run(slice(None)), run(slice(tokens - last, None)), strict=True
    ):
        assert torch.equal(whole[-last:], alone), name


def test_the_mixture_is_as_near_the_truth_as_the_reference() -> None:
    """On experts as the router leaves them, and rows that have other neighbours in another batch."""
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()

    x, up, down, grad_output = (
        draw(900, 256),
        draw(16, 256, 2, 192, scale=0.06),
        draw(16, 192, 256, scale=0.07),
        draw(900, 256),
    )
    score = torch.rand(900, 16, generator=generator, device="cuda")
    chosen = route.top_k(score, 4)
    weight = score.gather(-1, chosen)
    c = config().model
    sized = attrs.evolve(c, hidden_size=256, moe=attrs.evolve(c.moe, intermediate_size=192))
    kernel = ops.build(torch.device("cuda"), sized).experts

    def run(which: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in (x, up, down)]
        gates = weight.to(torch.float64 if dtype is torch.float64 else torch.float32, copy=True).requires_grad_()
        y, count = which(leaves[0], Routing(chosen, gates), *leaves[1:])
        assert torch.equal(count, route.load(chosen, 16))
        y.backward(grad_output.to(dtype))
        grads = [leaf.grad.double() for leaf in (*leaves, gates) if leaf.grad is not None]
        return [y.detach().double(), *grads]

    plain = partial(experts.moe_experts, experts=experts_by_segment)
    truth, near, ours = run(plain, torch.float64), run(plain, torch.bfloat16), run(kernel, torch.bfloat16)
    for name, t, p, g in zip(("y", "dx", "dup", "ddown", "dgate"), truth, near, ours, strict=True):
        assert (g - t).norm() <= 1.5 * (p - t).norm(), name
    some = torch.arange(900, device="cuda") % 3 != 0
    whole, _ = kernel(x, Routing(chosen, weight), up, down)
    part, _ = kernel(x[some], Routing(chosen[some], weight[some]), up, down)
    assert torch.equal(whole[some], part)


def test_a_replayed_step_is_the_eager_one_bit_for_bit() -> None:
    """Fresh tokens, and so fresh routing, in every step."""
    eager = config()
    replayed = attrs.evolve(eager, train=attrs.evolve(eager.train, graph=True))
    rt = process.Runtime(device=gpu.device("cuda"), rank=0, world=1, peak_flops=1.0)
    found: list[tuple[list[float], State]] = []
    for c in (eager, replayed):
        blueprint = make_blueprint(c)
        state, env = fresh(c, blueprint, rt)
        step = make_step(c, blueprint, env, rt, mark=lambda name: None)
        generator = torch.Generator().manual_seed(3)
        losses: list[float] = []
        for _ in range(12):
            tokens = torch.randint(c.model.vocab_size, (2, 4, c.train.sequence_length + 1), generator=generator).cuda()
            state, metrics = step(state, Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), ()))
            losses.append(metrics.loss.item())
        found.append((losses, state))
    (losses, one), (again, two) = found
    assert losses == again and len(set(losses)) == len(losses)
    assert (one.step, one.cursor) == (two.step, two.cursor) == (12, 96)
    assert torch.equal(one.router_bias, two.router_bias)
    for (path, a), (_, b) in zip(tree.leaves(one.params), tree.leaves(two.params), strict=True):
        assert torch.equal(a, b), path


@pytest.mark.parametrize("policy", ["cheap", "full"])
def test_recomputing_changes_no_bit(policy: str) -> None:
    plain = config()
    again = attrs.evolve(plain, train=attrs.evolve(plain.train, recompute=policy))
    (one, first), (two, second) = train(plain, 5), train(again, 5)
    assert [each.loss.item() for each in first] == [each.loss.item() for each in second]
    for (path, a), (_, b) in zip(tree.leaves(one.params), tree.leaves(two.params), strict=True):
        assert torch.equal(a, b), path


@pytest.mark.parametrize("counts", [(5, 0, 70, 13), (88, 0, 0, 0), (0, 0, 0, 88), (22, 22, 22, 22)])
def test_grouped_experts_are_as_near_the_truth_as_plain_bf16(counts: tuple[int, ...]) -> None:
    """Error against fp64, compared with the error of the same rows through plain bf16 products."""
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    num = sum(counts)
    x, up, down = draw(num, 64), draw(4, 64, 2, 32) / 8, draw(4, 32, 64) / 6
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    expert = expert[torch.randperm(num, generator=torch.Generator().manual_seed(2))]
    routing = Routing(expert.cuda()[:, None], torch.ones(num, 1, device="cuda"))
    grad_output = draw(num, 64)

    def run(kind: str) -> list[torch.Tensor]:
        dtype = torch.float64 if kind == "truth" else torch.bfloat16
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in (x, up, down)]
        rows = experts.dispatch(leaves[0], routing, num_experts=4)
        which = cpu.experts_grouped if kind == "grouped" else experts_by_segment
        y = experts.combine(which(rows, leaves[1], leaves[2]), rows, routing)
        y.backward(grad_output.to(dtype))
        return [y.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]

    truth, plain, grouped = run("truth"), run("plain"), run("grouped")
    for name, t, p, g in zip(("y", "dx", "dup", "ddown"), truth, plain, grouped, strict=True):
        assert (g - t).norm() <= 1.5 * (p - t).norm() + 1e-12, name


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_what_a_bench_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = moe.Case(tokens=1024, hidden=256, width=128, experts=8, top_k=2, routing="natural")
    monkeypatch.setattr(moe, "CASES", (small,))
    monkeypatch.setattr(optimizer, "CASES", [attrs.evolve(case, size=1 << 20) for case in optimizer.CASES])
    assert kernel_bench.kernels(("moe", "optimizer"), tmp_path / "rows.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows[:3]] == ["ours", "grouped_mm compiled", "grouped_mm"]
    assert all(row["both_s"] > 0 and 0 < row["share"] for row in rows)
    errors = {row["variant"]: row["error"] for row in rows[:4]}
    assert errors["ours"] < 1.5 * errors["grouped_mm"] < 0.05
    assert 0.02 < errors["ours, fp8"] < 0.1, "e4m3 has 3 bits of mantissa"
    assert all(row["error"] < 1e-2 for row in rows[4:] if row["error"] is not None)
    assert capsys.readouterr().out.count("ours") == 5
