"""The step against torch's own optimizer, and what it promises of its state."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.sections import Config
from nmoe.effects.device import buffers, cpu, ops
from nmoe.effects.device.process import Runtime
from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.train import resume
from nmoe.effects.train.build import check_memory, fresh, memory_explained
from nmoe.effects.train.step import SpentStateError, State, learning_rates, make_step, tokens_per_step
from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.core.layout import ArenaLayout
from nmoe.pure.core.spec import POLICY
from nmoe.pure.cost.plan import plan
from nmoe.pure.formats import master
from nmoe.pure.model import experts
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch, objective
from nmoe.pure.model.route import Routing
from nmoe.pure.optim import adamw as optim
from nmoe.pure.optim import update
from tests.effects.train.tiny import tiny
from tests.kernels.exchange.nvshmem import experts_by_segment
from tests.shapes import REFERENCE

RT = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)


def batches(config: Config, num: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    train = config.train
    shape = (train.batch_size // train.microbatch_size, train.microbatch_size, train.sequence_length + 1)
    drawn = [torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(num)]
    return [Batch(each[..., :-1].contiguous(), each[..., 1:].contiguous(), ()) for each in drawn]


def start(config: Config, dtype: torch.dtype | None = None) -> tuple[State, Any]:
    """A fresh state and its step; `dtype` puts everything into one format."""
    blueprint = make_blueprint(config)
    if dtype is not None:
        formats = {"storage": dtype, "gradient": dtype, "moments": dtype}
        layouts = tuple(attrs.evolve(layout, **formats) for layout in blueprint.layouts)
        blueprint = attrs.evolve(blueprint, layouts=layouts)
    state, env = fresh(config, blueprint, RT)
    if dtype is not None:
        env = attrs.evolve(env, ops=REFERENCE)  # torch's grouped product knows no fp64
        state = attrs.evolve(state, router_bias=state.router_bias.to(dtype))
    return state, make_step(config, blueprint, env, RT, mark=lambda name: None)


def snapshot(state: State) -> list[Tensor]:
    return [leaf.detach().clone() for _, leaf in tree.leaves(state) if isinstance(leaf, Tensor)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("microbatch", [4, 2, 1])
def test_steps_are_those_of_torch_adamw_with_clip(microbatch: int) -> None:
    config = tiny(batch_size=4, microbatch_size=microbatch, clip_norm=0.5, steps=6)
    state, step = start(config, torch.float64)
    leaves = [leaf.detach().clone().requires_grad_() for _, leaf in tree.leaves(state.params)]
    specs = [spec for _, spec in tree.leaves(_specs(config))]
    names = iter(leaves)
    theirs = tree.map(lambda path, _: next(names), state.params)
    rates = learning_rates(config, tokens_per_step(config))
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [leaf],
                "lr": rates[POLICY[spec.role].group],
                "betas": (config.optim.dense.beta1, config.optim.dense.beta2),
                "weight_decay": config.optim.weight_decay if POLICY[spec.role].decay else 0.0,
            }
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
    )
    env = attrs.evolve(fresh(config, make_blueprint(config), RT)[1], ops=REFERENCE)
    for index, batch in enumerate(batches(config, 5)):
        whole = Batch(batch.tokens.flatten(0, 1), batch.targets.flatten(0, 1), ())
        loss, nll, _ = objective(
            theirs,
            whole,
            state.router_bias,
            env,
            config.model,
            num_targets=torch.tensor(whole.targets.numel()),
            num_sequences=4,
            chunk=64,
        )
        for group, spec in zip(optimizer.param_groups, specs, strict=True):
            group["lr"] = learning_rates(config, (index + 1) * tokens_per_step(config))[POLICY[spec.role].group]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        before = [leaf.detach().clone() for leaf in leaves]
        optimizer.step()
        state, metrics = step(state, batch)
        torch.testing.assert_close(metrics.loss, nll / whole.targets.numel(), rtol=1e-12, atol=0, check_dtype=False)
        torch.testing.assert_close(metrics.grad_norm, norm, rtol=1e-10, atol=0)
        moved = torch.cat([(new.detach() - old).flatten() for new, old in zip(leaves, before, strict=True)]).norm()
        torch.testing.assert_close(metrics.update_norm, moved, rtol=1e-6, atol=0)
    for (path, ours), leaf in zip(tree.leaves(state.params), leaves, strict=True):
        assert (ours - leaf).abs().max() < 1e-8, path


def _specs(config: Config) -> Any:
    from nmoe.pure.model import model

    return model.specs(config.model)


def test_masked_targets_weigh_nothing_in_any_split() -> None:
    config = tiny(batch_size=4, microbatch_size=1)
    (batch,) = batches(config, 1)
    targets = batch.targets.clone()
    targets[0] = -1
    targets[1, :, ::2] = -1
    losses: list[Tensor] = []
    for microbatch in (1, 2, 4):
        c = tiny(batch_size=4, microbatch_size=microbatch)
        state, step = start(c, torch.float64)
        shape = (4 // microbatch, microbatch, -1)
        _, metrics = step(state, Batch(batch.tokens.view(shape), targets.view(shape), ()))
        losses.append(torch.stack([metrics.loss, metrics.grad_norm, metrics.update_norm]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-10, atol=0)


def test_a_donated_state_is_spent() -> None:
    config = tiny()
    state, step = start(config)
    after, _ = step(state, batches(config, 1)[0])
    for name in ("params", "arenas", "router_bias", "cursor", "skipped"):
        with pytest.raises(SpentStateError, match="step 0: expected one that is not donated"):
            getattr(state, name)
    assert after.step == 1 and after.cursor == config.train.batch_size
    with pytest.raises(SpentStateError):
        step(state, batches(config, 1)[0])


def test_storages_are_reused() -> None:
    config = tiny(compute="bf16")
    state, step = start(config)

    def addresses(of: State) -> list[int]:
        found = [leaf.data_ptr() for _, leaf in tree.leaves((of.params, of.arenas))]
        return found + [leaf.grad.data_ptr() for _, leaf in tree.leaves(of.params)]

    before = addresses(state)
    for batch in batches(config, 3):
        state, _ = step(state, batch)
    assert addresses(state) == before


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_nonfinite_step_changes_nothing_and_is_counted(compute: str) -> None:
    config = tiny(compute=compute, max_nonfinite_steps=2)
    good = batches(config, 5)
    state, step = start(config)
    state, _ = step(state, good[0])
    kept = snapshot(attrs.evolve(state, updates=state.updates.clone()))
    state, metrics = poisoned(state, step, good[1])
    assert not torch.isfinite(metrics.grad_norm)
    assert (int(metrics.skipped), int(metrics.skipped_in_row)) == (1, 1)
    assert same(kept[:-3], snapshot(state)[:-3]), "parameters, moments and bias stay"
    assert int(state.updates) == 1
    state, metrics = step(state, good[2])
    assert (int(metrics.skipped), int(metrics.skipped_in_row)) == (1, 0)
    assert int(state.updates) == 2 and not same(kept[:-3], snapshot(state)[:-3])


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_step_without_a_target_changes_nothing(compute: str) -> None:
    """Its only gradient is the balance loss's, which Adam would scale to a whole step. It is not a non-finite step."""
    config = tiny(compute=compute)
    first, empty, last = batches(config, 3)
    state, step = start(config)
    state, _ = step(state, first)
    kept = snapshot(state)
    state, metrics = step(state, attrs.evolve(empty, targets=torch.full_like(empty.targets, -1)))
    assert same(kept, snapshot(state)), "parameters, moments, bias and counters stay"
    assert (float(metrics.loss), float(metrics.update_norm)) == (0.0, 0.0)
    assert (state.step, state.cursor) == (2, 2 * config.train.batch_size)
    state, metrics = step(state, last)
    assert float(metrics.update_norm) > 0


def poisoned(state: State, step: Any, batch: Batch) -> tuple[State, Any]:
    """A step whose gradient is not a number: one gradient element is, before the step adds to it."""
    state.arenas[0].gradient[3] = float("nan")
    return step(state, batch)


def test_the_limit_of_nonfinite_steps_freezes_the_state() -> None:
    config = tiny(max_nonfinite_steps=2)
    good = batches(config, 4)
    state, step = start(config)
    state, _ = step(state, good[0])
    kept = snapshot(state)
    state, _ = poisoned(state, step, good[1])
    state, _ = poisoned(state, step, good[2])
    state, metrics = step(state, good[3])
    assert int(metrics.skipped_in_row) == 3, "a finite step after the limit does not count as one"
    assert same(kept[:-3], snapshot(state)[:-3])


def test_bf16_keeps_an_exact_master() -> None:
    """Updates far below half a bf16 step add up, because the low halves are kept."""
    config = tiny(compute="bf16", lr=1e-5)
    state, step = start(config)
    wide, wide_step = start(tiny(compute="fp32", lr=1e-5))
    rounded = [leaf.detach().clone() for _, leaf in tree.leaves(state.params)]
    for batch in batches(config, 30):
        state, _ = step(state, batch)
        wide, _ = wide_step(wide, batch)
    blueprint = make_blueprint(config)
    moved = 0
    for described, arena in zip(blueprint.layouts, state.arenas, strict=True):
        if described.has_remainder():
            exact = master.join(arena.value, arena.remainder)
            assert torch.equal(exact.bfloat16(), arena.value) or (exact - arena.value.float()).abs().max() > 0
            moved += int((arena.remainder != 0).sum())
    assert moved > 0
    exact = dict(tree.leaves(wide.params))
    changed = sum(int((leaf != old).sum()) for (_, leaf), old in zip(tree.leaves(state.params), rounded, strict=True))
    assert changed > 0, "some parameters crossed a bf16 step"
    for path, leaf in tree.leaves(state.params):
        assert torch.allclose(leaf.float(), exact[path], atol=2e-3, rtol=1e-2), path


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_same_steps_twice_are_bitwise_the_same(compute: str) -> None:
    config = tiny(compute=compute, batch_size=4, microbatch_size=2)

    def run() -> list[Tensor]:
        state, step = start(config)
        losses: list[Tensor] = []
        for batch in batches(config, 5):
            state, metrics = step(state, batch)
            losses.append(metrics.loss)
        return [*snapshot(state), *losses]

    assert same(run(), run())


@pytest.mark.parametrize("format_", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(5, 0, 70, 13), (88, 0, 0, 0), (0, 0, 0, 88), (22, 22, 22, 22)])
def test_grouped_experts_are_as_near_the_truth_as_plain_ones(counts: tuple[int, ...], format_: torch.dtype) -> None:
    """Error against fp64, compared with the error of the same rows through plain products."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(format_)

    num = sum(counts)
    x, up, down, grad_output = draw(num, 64), draw(4, 64, 2, 32) / 8, draw(4, 32, 64) / 6, draw(num, 64)
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    routing = Routing(expert[torch.randperm(num, generator=generator)][:, None], torch.ones(num, 1))

    def run(which: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in (x, up, down)]
        rows = experts.dispatch(leaves[0], routing, num_experts=4)
        y = experts.combine(which(rows, leaves[1], leaves[2]), rows, routing)
        y.backward(grad_output.to(dtype))
        return [y.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]

    truth = run(experts.experts, torch.float64)
    plain, grouped = run(experts_by_segment, format_), run(cpu.experts_grouped, format_)
    for name, t, p, g in zip(("y", "dx", "dup", "ddown"), truth, plain, grouped, strict=True):
        assert (g - t).norm() <= 1.5 * (p - t).norm(), name


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_gradients_that_ops_store_anew_are_not_cleared(compute: str) -> None:
    """Of an arena in which that is said of every parameter; the update is the same."""
    config = tiny(compute=compute)
    blueprint = make_blueprint(config)
    found: list[list[Tensor]] = []
    for many in (0, 1, 99):
        state, env = fresh(config, blueprint, RT)
        [held] = [arena for arena, layout in zip(state.arenas, blueprint.layouts, strict=True) if layout.policy.shard]
        leaves = [leaf for path, leaf in tree.leaves(state.params) if path.endswith((".up", ".down"))]
        begin, size = held.value.data_ptr(), held.value.nbytes
        inside = [leaf.data_ptr() for leaf in leaves if 0 <= leaf.data_ptr() - begin < size]
        assert len(inside) > 1
        accumulator = Accumulator(stored=set(inside[:many]))
        step = make_step(config, blueprint, env, RT, mark=lambda name: None, accumulator=accumulator)
        state, _ = step(state, batches(config, 1)[0])
        cleared = [not arena.gradient.any() for arena in state.arenas]
        assert cleared == [arena is not held or many < 99 for arena in state.arenas]
        held.gradient.zero_()
        found.append(snapshot(state))
    assert same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shrink", [1.0, 0.3])
def test_the_pass_over_an_arena_is_the_reference(decay: float, shrink: float) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1000, generator=generator, dtype=torch.float64)
    theirs, first, second = value.clone(), torch.zeros_like(value), torch.zeros_like(value)
    kept = optim.Moments(first.clone(), second.clone())
    numbers: Any = {"lr": torch.tensor(3e-3, dtype=torch.float64), "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    for count in range(1, 6):
        gradient = torch.randn(1000, generator=generator, dtype=torch.float64)
        old = value
        value, kept = optim.adamw(value, gradient * shrink, kept, updates=torch.tensor(count), decay=decay, **numbers)
        change = cpu.adamw_(
            theirs,
            None,
            first,
            second,
            gradient,
            allowed=torch.tensor(True),
            shrink=torch.tensor(shrink, dtype=torch.float64),
            updates=torch.tensor(count),
            decay=decay,
            **numbers,
        )
        torch.testing.assert_close(change, (value - old).norm(), rtol=1e-10, atol=0)
        assert not gradient.any()
    torch.testing.assert_close(theirs, value, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(second, kept.second, rtol=1e-11, atol=0)


@pytest.mark.parametrize("value_channels", [7, 12, 20], ids=["narrower", "equal", "wider"])
def test_padded_attention_is_the_reference(value_channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 3, 12), (2, 9, 3, 8 + value_channels), (2, 9, 4))
    found: list[list[Tensor]] = []
    for attend in (cpu.attend_mla_padded, REFERENCE.attention.attend):
        generator.manual_seed(0)
        leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
        o = attend(*leaves, scale=0.3)
        o.backward(torch.randn(o.shape, generator=generator, dtype=torch.float64))
        found.append([o.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-12)


def test_a_machine_without_the_memory_is_said_before_anything_is_allocated() -> None:
    config = tiny()
    config = attrs.evolve(config, model=attrs.evolve(config.model, intermediate_size=2**20, hidden_size=2**20))
    blueprint = make_blueprint(config)
    planned = plan(config, blueprint, mfu=0.4, peak_flops=1e12, dedup=True, capacity=2.0)
    with pytest.raises(InputError, match=r"train.microbatch_size: expected a step that fits the machine's"):
        check_memory(config, planned, torch.device("cpu"))


@pytest.mark.parametrize(
    ("raised", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB"), "20.00 GiB"),
        (RuntimeError("CUDA driver error: out of memory"), "another tensor"),
    ],
    ids=["torch's pools", "symmetric"],
)
def test_memory_that_runs_out_is_one_line(raised: RuntimeError, asked: str) -> None:
    config = tiny()
    planned = plan(config, make_blueprint(config), mfu=0.4, peak_flops=1e12)
    with pytest.raises(InputError) as found, memory_explained(planned):
        raise raised
    (line,) = found.value.problems
    assert line.startswith(f"GPU memory: expected room for {asked}, got none beside the planned parameters ")
    assert "moments " in line and "lower train.microbatch_size" in line


def test_another_error_stays_what_it_is() -> None:
    config = tiny()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        with memory_explained(plan(config, make_blueprint(config), mfu=0.4, peak_flops=1e12)):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_place_keeps_the_structure() -> None:
    config = tiny()
    state, _ = start(config)
    moved = buffers.place(state.arenas, torch.device("cpu"))
    assert [path for path, _ in tree.leaves(moved)] == [path for path, _ in tree.leaves(state.arenas)]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_second_optimizer_is_a_rule_and_a_policy(monkeypatch: pytest.MonkeyPatch, compute: str) -> None:
    """Momentum (one moment) for the dense group, AdamW for the others, trained, saved and loaded by the same code."""

    def momentum(
        value: Tensor, gradient: Tensor, moments: tuple[Tensor], *, updates: Tensor, lr: Tensor, beta1: float, **_: Any
    ) -> tuple[Tensor, tuple[Tensor]]:
        velocity = beta1 * moments[0].to(value.dtype) + gradient
        return value - lr.to(value.dtype) * velocity, (velocity,)

    monkeypatch.setattr(
        update, "UPDATES", {**update.UPDATES, "momentum": update.Rule(("velocity",), momentum, ("beta1",))}
    )
    config = tiny(compute=compute, lr=1e-2)
    config = attrs.evolve(config, optim=attrs.evolve(config.optim, clip_norm=1e9))
    blueprint = make_blueprint(config)

    def moved(layout: ArenaLayout) -> ArenaLayout:
        policy = attrs.evolve(layout.policy, optimizer="momentum")
        return attrs.evolve(layout, policy=policy) if layout.policy.group == "dense" else layout

    blueprint = attrs.evolve(blueprint, layouts=tuple(map(moved, blueprint.layouts)))
    state, env = fresh(config, blueprint, RT)
    assert {len(arena.moments) for arena in state.arenas} == {1, 2}
    names = {piece.name for piece in resume.pieces(state, blueprint)}
    assert "param/head/velocity" in names and "param/head/first" not in names
    assert "param/blocks.1.ffn.up/second" in names
    before = state.params.head.detach().clone()
    step = make_step(config, blueprint, env, RT, mark=lambda name: None)
    losses: list[float] = []
    for batch in batches(config, 1) * 20:
        state, metrics = step(state, batch)
        losses.append(metrics.loss.item())
        if len(losses) == 1 and compute == "fp32":
            (velocity,) = [
                buffers.view(arena.moments[0], slot)
                for layout, arena in zip(blueprint.layouts, state.arenas, strict=True)
                for slot in layout.slots
                if slot.path == "head"
            ]
            change = state.params.head.detach() - before
            assert velocity.any()
            torch.testing.assert_close(
                change, -learning_rates(config, tokens_per_step(config))["dense"] * velocity, rtol=1e-3, atol=1e-7
            )
    assert losses[-1] < losses[0] - 0.3, losses
    with pytest.raises(ValueError, match="expected one of adamw, muon, momentum, got 'sgd'"):
        ops.arena_ops(RT.device).update_("sgd")
