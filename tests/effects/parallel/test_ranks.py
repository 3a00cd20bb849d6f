"""Several ranks train as one: over gloo, each rank a process, with real files and real deaths."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist

from nmoe.config.sections import Config, Mtp, Shards
from nmoe.effects.checkpoint import reader, weights
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.writer import open_writer
from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.parallel import ranks as meeting
from nmoe.effects.parallel.launch import MULTICAST_OFF, from_environment
from nmoe.effects.parallel.ranks import Ranks
from nmoe.effects.record.names import WEIGHTS
from nmoe.effects.train import resume, run, zero
from nmoe.effects.train.identity import Identity
from nmoe.errors import InputError
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.core import tree
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch, objective
from nmoe.pure.watch.validations import Validations
from tests.effects.parallel.rank_runs import as_world, environment, free_port, in_group, on_ranks, state_of, train
from tests.effects.train.tiny import tiny, with_attention

STEPS = 4


def config_of(sources: Path, work: Path, name: str, **change: Any) -> Config:
    """Four sequences a step; the clip does not bind, so that gradients reach the parameters as they are."""
    sizes: dict[str, Any] = {
        "batch_size": 4,
        "microbatch_size": 1,
        "steps": STEPS,
        "lr": 3e-3,
        "clip_norm": 1e9,
        **change,
    }
    config = tiny(vocab_size=304, source=Shards(path=str(sources)), **sizes)
    return attrs.evolve(
        config,
        run=attrs.evolve(config.run, root=str(work / "runs"), name=name),
        log=attrs.evolve(config.log, every=1, footer=False),
        validation=attrs.evolve(config.validation, every=2, tokens=48),
        checkpoint=attrs.evolve(config.checkpoint, every=1, keep_last=STEPS),
    )


def trained(config: Config, world: int = 1, **parallel: Any) -> Path:
    """The folder of a run that finished on so many ranks."""
    parallel = {"experts": 1, **parallel}
    root = Path(config.run.root)
    told = train(as_world(config, world, **parallel), root / f"{config.run.name}.out")
    assert [code for code, _ in told] == [0] * world, told
    assert "finished" in told[0][1] and all(text == "" for _, text in told[1:]), told
    return root / str(config.run.name)


def digests(folder: Path, step: int) -> dict[str, str]:
    """Of each tensor of a run after so many steps; how many ranks wrote them does not matter."""
    found = [each.manifest for each in reader.entries(Disk(), folder / "checkpoints")]
    (manifest,) = [each for each in found if each is not None and each.step == step]
    return {name: entry.digest for name, entry in manifest.tensors.items()}


def lines(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"metrics.rank{rank}.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.fixture(scope="module")
def alone(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with two microbatches of two sequences."""
    return trained(config_of(sources, tmp_path_factory.mktemp("alone"), "alone", microbatch_size=2))


def test_two_ranks_with_half_the_batch_are_one_rank_bit_for_bit(alone: Path, sources: Path, tmp_path: Path) -> None:
    """Two sums of two have one rounding, in either order: everything but the norms is the same."""
    config = config_of(sources, tmp_path, "two", microbatch_size=2)
    two = trained(config, 2)
    for step in range(1, STEPS + 1):
        assert digests(two, step) == digests(alone, step), step
    assert (two / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes()
    assert losses(two) == losses(alone)
    for mine, its in zip(lines(two), lines(alone), strict=True):
        # fp32 norms of parts, squared and added in fp64, against one fp32 norm of all: 4.2 units in the last place have
        # been seen, and the text is this package's, so that the numbers are others after every edit
        norms = [(mine[key], its[key]) for key in ("grad_norm", "update_norm") if key in mine]
        assert all(math.isclose(*pair, rel_tol=2**-20) for pair in norms), norms
        if "validation/loss" in mine:
            assert math.isclose(mine["validation/loss"], its["validation/loss"], rel_tol=2**-21)
    own = lines(two, rank=1)
    assert [line["step"] for line in own] == [1, 2, 3, 4] and own[-1]["tokens_local"] == STEPS * 2 * 16
    assert own[-1]["time/reduce_s"] > 0 < own[-1]["time/gather_s"] and "loss" not in own[-1]
    assert json.loads((two / "run.json").read_text())["world"] == 2
    manifest = reader.entries(Disk(), two / "checkpoints")[0].manifest
    assert manifest is not None and len(manifest.files) == 2

    again = trained(attrs.evolve(config, run=attrs.evolve(config.run, name="again")), 2)
    assert digests(again, STEPS) == digests(two, STEPS) and losses(again) == losses(two)


def test_gradients_in_bf16_are_those_of_fp32_rounded(sources: Path, tmp_path: Path) -> None:
    """A rank with one microbatch rounds its gradients once, where one rank with two keeps them in fp32."""
    found: dict[int, list[dict[str, Any]]] = {}
    for world in (1, 2):
        config = config_of(sources, tmp_path, f"bf16-{world}", microbatch_size=2)
        config = attrs.evolve(config, precision=attrs.evolve(config.precision, compute="bf16"))
        found[world] = [line for line in lines(trained(config, world)) if "grad_norm" in line]
    assert len(found[1]) == STEPS and found[1][0]["loss"] == found[2][0]["loss"]
    for one, two in zip(found[1], found[2], strict=True):
        assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=2**-7), (one, two)
        assert math.isclose(one["loss"], two["loss"], rel_tol=2**-9)
    assert [line["grad_norm"] for line in found[1]] != [line["grad_norm"] for line in found[2]]


def test_quantiles_of_two_ranks_are_those_of_one(sources: Path, tmp_path: Path) -> None:
    """Histograms are summed over ranks and microbatches in integers."""

    def run(name: str, ranks: int) -> Path:
        config = config_of(sources, tmp_path, name, microbatch_size=2)
        moe = attrs.evolve(config.model.moe, balance="quantile")
        return trained(attrs.evolve(config, model=attrs.evolve(config.model, moe=moe)), ranks)

    one, two = run("one", 1), run("two", 2)
    for step in range(1, STEPS + 1):
        assert digests(two, step) == digests(one, step), step


def test_multi_token_prediction_on_two_ranks_is_that_of_one(sources: Path, tmp_path: Path) -> None:
    """Further blocks, their losses and the balance of their experts."""

    def run(name: str, ranks: int, experts: int = 1) -> Path:
        config = config_of(sources, tmp_path, name, microbatch_size=2)
        config = attrs.evolve(config, model=attrs.evolve(config.model, mtp=Mtp(depth=2)))
        return trained(config, ranks, experts=experts)

    def ahead(folder: Path) -> list[list[float]]:
        return [[line["mtp/loss_1"], line["mtp/loss_2"]] for line in lines(folder) if "loss" in line]

    one, two = run("one", 1), run("two", 2)
    for step in range(1, STEPS + 1):
        assert digests(two, step) == digests(one, step), step
    assert ahead(two) == ahead(one)
    shared = run("shared", 2, experts=2)
    for mine, its in zip(ahead(shared), ahead(one), strict=True):
        assert mine == pytest.approx(its, rel=1e-4)


@pytest.mark.parametrize("attention", ["kda, nsa, dsa", "gqa, kda"])
def test_kinds_of_attention_on_two_ranks_are_those_of_one(attention: str, sources: Path, tmp_path: Path) -> None:
    """Every tensor of every kind, its gradient reduced and its moments shared out, with documents kept apart."""

    def run(name: str, ranks: int) -> Path:
        config = with_attention(config_of(sources, tmp_path, name, microbatch_size=2), attention)
        return trained(attrs.evolve(config, train=attrs.evolve(config.train, document_mask=True)), ranks)

    one, two = run("one", 1), run("two", 2)
    for step in range(1, STEPS + 1):
        assert digests(two, step) == digests(one, step), step
    assert losses(two) == losses(one)


def test_muon_on_two_ranks_is_muon_on_one_bit_for_bit(sources: Path, tmp_path: Path) -> None:
    """Each rank orthogonalises whole matrices of its own; moments are saved by whoever has them."""

    def run(name: str, ranks: int, experts: int = 1) -> Path:
        config = config_of(sources, tmp_path, name, microbatch_size=2)
        group = attrs.evolve(config.optim.dense, optimizer="muon")
        config = attrs.evolve(config, optim=attrs.evolve(config.optim, dense=group, expert=group))
        return trained(config, ranks, experts=experts)

    one, two = run("one", 1), run("two", 2)
    assert "param/blocks.1.ffn.up/momentum" in digests(one, STEPS)
    for step in range(1, STEPS + 1):
        assert digests(two, step) == digests(one, step), step
    # Experts shared out: one product over the tokens of both ranks, so gradients round otherwise.
    assert losses(run("shared", 2, experts=2)) == pytest.approx(losses(one), rel=1e-4)


def test_the_scores_of_all_ranks_clip_queries_and_keys(sources: Path, tmp_path: Path) -> None:
    """Elements of one parameter that two ranks share out, and the largest score of either."""

    def run(name: str, ranks: int) -> Path:
        config = config_of(sources, tmp_path, name, microbatch_size=2)
        return trained(attrs.evolve(config, optim=attrs.evolve(config.optim, qk_clip=0.4)), ranks)

    one, two = run("one", 1), run("two", 2)
    for step in range(1, STEPS + 1):
        assert digests(two, step) == digests(one, step), step
    plain = trained(config_of(sources, tmp_path, "plain", microbatch_size=2))
    changed = {name for name, digest in digests(one, 1).items() if digest != digests(plain, 1)[name]}
    assert changed == {f"param/blocks.{layer}.attention.{name}/value" for layer in range(3) for name in ("down", "up")}


@pytest.mark.long
def test_any_number_of_ranks_goes_on_from_any_other(sources: Path, tmp_path: Path) -> None:
    """1, 2, 4 and 1 ranks in turn read the stream that one rank reads, and stay within the rounding of sums."""
    whole = config_of(sources, tmp_path, "whole")
    config = attrs.evolve(whole, run=attrs.evolve(whole.run, name="parts"))

    def told(name: str) -> run.World:
        """Writes down what this rank reads."""

        def noting(read: Callable[[int], Batch]) -> Callable[[int], Batch]:
            def note(cursor: int) -> Batch:
                batch = read(cursor)
                with open(tmp_path / name, "a", encoding="utf-8") as file:
                    for index, row in enumerate(batch.tokens.flatten(0, 1).tolist()):
                        file.write(json.dumps([cursor, index, row]) + "\n")
                return batch

            return note

        return run.World(read=noting)

    def stream(prefix: str) -> list[list[int]]:
        """The sequences in the order of the stream, whichever rank read them."""
        found: list[tuple[int, int, list[int]]] = []
        for path in sorted(tmp_path.glob(f"{prefix}-*")):
            world, rank = (int(each) for each in path.name.removeprefix(f"{prefix}-").split("-"))
            for line in path.read_text().splitlines():
                cursor, index, row = json.loads(line)
                found.append((cursor + rank * (4 // world) + index, world, row))
        return [row for _, _, row in sorted(found)]

    assert train(as_world(whole, 1), tmp_path / "whole.out", {0: told("whole-1-0")})[0][0] == 0
    for steps, world in enumerate((1, 2, 4, 1), 1):
        part = attrs.evolve(config, train=attrs.evolve(config.train, steps=steps))
        worlds = {rank: told(f"parts-{world}-{rank}") for rank in range(world)}
        got = train(as_world(part, world, experts=1), tmp_path / f"{steps}.out", worlds)
        assert [code for code, _ in got] == [0] * world, got
    assert len(stream("whole")) == STEPS * 4 and stream("parts") == stream("whole")
    parts = tmp_path / "runs" / "parts"
    assert digests(parts, 1) == digests(tmp_path / "runs" / "whole", 1)
    assert [line["step"] for line in lines(parts) if "loss" in line] == [1, 2, 3, 4]
    for mine, its in zip(losses(parts), losses(tmp_path / "runs" / "whole"), strict=True):
        assert math.isclose(mine, its, rel_tol=1e-5)


def test_a_state_is_the_same_whoever_saves_it(alone: Path, sources: Path, tmp_path: Path) -> None:
    """Loaded and saved by 2, 4 (two groups of two that share the experts) and 1 ranks: every digest as it was."""
    config = config_of(sources, tmp_path, "x", microbatch_size=1)
    this = Identity(config=config, tokenizer="", data="")
    root = alone / "checkpoints"
    for world, experts in ((2, 2), (4, 2), (1, 1)):
        there = tmp_path / f"by-{world}"

        def save_again(ranks: Ranks, root: Path = root, there: Path = there) -> None:
            blueprint, state, _ = state_of(config, ranks, bucket=2048)
            targets = resume.pieces(state, blueprint, ranks=ranks, shared=False)
            told: dict[str, Any] = {"rank": ranks.world.rank, "all_gather_text": ranks.all_gather_text}
            manifest = reader.restore_(Disk(), root, lambda _: targets, report=print, **told)
            assert manifest is not None and manifest.step == STEPS
            keep = Keep(last=1)
            where: dict[str, Any] = {
                "rank": ranks.world.rank,
                "world": ranks.world.size,
                "all_gather_text": ranks.background,
            }
            with open_writer(Disk(), there, keep=keep, **where) as writer:
                pieces = resume.pieces(state, blueprint, ranks=ranks)
                writer.save(pieces, step=STEPS, meta=resume.meta(state, (0,), Validations(), this))
                writer.wait()

        in_group(as_world(config, world, experts=experts), tmp_path / f"{world}.out", save_again)
        (entry,) = reader.entries(Disk(), there)
        assert entry.manifest is not None and len(entry.manifest.files) == world
        assert {name: each.digest for name, each in entry.manifest.tensors.items()} == digests(alone, STEPS)
        root = there


def gradients(
    config: Config, ranks: Ranks, bucket: int, microbatches: int
) -> tuple[Any, list[torch.Tensor], list[torch.Tensor], list[str]]:
    """Layouts; local gradients; the sums that this rank owns; what was given away before the backward pass ended."""
    blueprint, state, (env, _) = state_of(config, ranks, bucket, microbatches)
    layouts = blueprint.layouts
    draw = torch.Generator().manual_seed(ranks.world.rank)
    tokens = torch.randint(0, 300, (2, 16), generator=draw)
    batch = Batch(tokens, tokens.roll(-1), ())
    order: list[str] = []
    shipped = zero._reduce_scatter_

    def noting(group: meeting.Group, flat: torch.Tensor, sums: torch.Tensor | None) -> Any:
        order.append(f"{group.size}:{flat.numel()}:{flat.storage_offset()}")
        return shipped(group, flat, sums)

    def backward() -> None:
        loss, _, _ = objective(
            state.params,
            batch,
            state.router_bias,
            env,
            config.model,
            num_targets=torch.tensor(64),
            num_sequences=4,
            chunk=64,
        )
        loss.backward()

    backward()
    local = [arena.gradient.clone() for arena in state.arenas]
    for arena in state.arenas:
        arena.gradient.zero_()
        if isinstance(arena.sums, torch.Tensor):
            arena.sums.fill_(torch.nan)  # of the step before, which nobody clears
    zero._reduce_scatter_ = noting
    try:
        with zero.scattering_(layouts, state.arenas, state.params, Accumulator(), ranks) as finish:
            backward()
            order.append("backward")
            finish()
    finally:
        zero._reduce_scatter_ = shipped
    return layouts, local, zero.owned(layouts, state.arenas, ranks), order


@pytest.mark.parametrize(("compute", "microbatches"), [("fp32", 1), ("bf16", 2), ("bf16", 1)])
def test_buckets_are_summed_while_the_backward_pass_makes_them(
    sources: Path, tmp_path: Path, compute: str, microbatches: int
) -> None:
    """In fp32, also those of bf16, which are where a rank has one microbatch."""
    config = as_world(config_of(sources, tmp_path, "x"), 2, experts=1)
    config = attrs.evolve(config, precision=attrs.evolve(config.precision, compute=compute))

    def check(ranks: Ranks) -> None:
        layouts, local, reduced, order = gradients(config, ranks, bucket=2048, microbatches=microbatches)
        assert (torch.bfloat16 in {flat.dtype for flat in local}) == (compute == "bf16" and microbatches == 1)
        assert {flat.dtype for flat in reduced} == {torch.float32}
        assert len(order) > 8 and order[-1] == "backward", order
        assert len(set(ranks.all_gather_text(json.dumps(order)))) == 1, "all ranks give buckets away in one order"
        wanted: list[torch.Tensor] = []
        for described, mine in zip(layouts, local, strict=True):
            total = mine.float()
            dist.all_reduce(total)
            wanted += [total[each.begin : each.end] for each in described.stretches(ranks.world.rank)]
        assert torch.equal(torch.cat(reduced), torch.cat(wanted)) and torch.cat(wanted).any()

    in_group(config, tmp_path / "out", check)


def test_experts_shared_out_are_the_experts_of_one_rank(alone: Path, sources: Path, tmp_path: Path) -> None:
    """One product over the tokens of two ranks instead of a sum of two products.

    So it is as far from one rank as that is from itself with other microbatches.
    """
    one = losses(trained(config_of(sources, tmp_path, "one", microbatch_size=4)))
    near = max(abs(a - b) for a, b in zip(one, losses(alone), strict=True))
    for name, world, experts, size in (("shared", 2, 2, 2), ("squares", 4, 2, 1)):
        folder = trained(config_of(sources, tmp_path, name, microbatch_size=size), world, experts=experts)
        assert losses(folder)[0] == pytest.approx(losses(alone)[0], rel=2**-22)
        far = max(abs(a - b) for a, b in zip(losses(folder), losses(alone), strict=True))
        assert far <= 4 * max(near, 2**-22 * one[0]), (name, far, near)
        told = lines(folder, rank=1)[-1]
        assert told["exchange/bytes"] > 0 < told["time/exchange_s"]
        parts = sum(value for name, value in told.items() if name.startswith("time/"))
        assert parts == pytest.approx(told["step_s"], rel=1e-6), "the exchange is in no other part"
        assert told["exchange/bandwidth"] == pytest.approx(told["exchange/bytes"] / told["step_s"])
        assert set(digests(folder, STEPS)) == set(digests(alone, STEPS))
        blueprint = make_blueprint(tiny(vocab_size=304))
        mine, _ = weights.load(folder, blueprint)
        its, _ = weights.load(alone, blueprint)
        apart = 2 * STEPS * 2 * 3e-3  # Adam moves an element by at most the learning rate a step
        for (path, leaf), (_, other) in zip(tree.leaves(mine), tree.leaves(its), strict=True):
            assert (leaf - other).abs().max() <= apart, path


def test_fp8_of_experts_shared_out_is_that_of_one_rank(sources: Path, tmp_path: Path) -> None:
    """Emulated. A row's codes do not depend on who holds it, so the first loss is that of one rank up to its sum, which
    that of bf16 is not; later ones are as far apart as those of one rank with other microbatches."""

    def run(name: str, compute: str, world: int, size: int) -> list[float]:
        config = config_of(sources, tmp_path, name, microbatch_size=size)
        model = attrs.evolve(config.model, hidden_size=128, moe=attrs.evolve(config.model.moe, intermediate_size=128))
        low = attrs.evolve(config.precision, compute=compute, emulate=compute == "fp8")
        return losses(trained(attrs.evolve(config, model=model, precision=low), world, experts=world, capacity=0.0))

    one, wide = run("one", "fp8", 1, 4), run("wide", "bf16", 1, 4)
    # a code that flips moves an element by a sixteenth, so that how far two runs come apart is chance after two steps:
    # one other run came as near as 0.008 where a third was 0.037 away (2026-11-29)
    others = [run("halves", "fp8", 1, 2), run("quarters", "fp8", 1, 1)]
    near = [max(abs(other[step] - loss) for other in others) for step, loss in enumerate(one)]
    for name, world, size in (("two", 2, 2), ("four", 4, 1)):
        far = [abs(a - b) for a, b in zip(run(name, "fp8", world, size), one, strict=True)]
        assert far[0] <= 2**-22 * one[0] and far[1] <= 4 * near[1] and max(far) <= 4 * max(near), (name, far, near)
    assert wide[0] != pytest.approx(one[0], rel=1e-5)


def test_a_rank_whose_loss_is_not_finite_stops_the_update_of_all(sources: Path, tmp_path: Path) -> None:
    """Its gradients are finite, so that the others do not learn of it through the sums of gradients."""

    def poisoned(env: Any) -> Any:
        calls = 0

        def loss(*arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal calls
            calls += 1
            total, nll = env.ops.linear_cross_entropy(*arguments, **named)
            factor = float("nan") if calls == 3 else 1.0  # two microbatches a step: in the second one
            return total, nll * factor

        return attrs.evolve(env, ops=attrs.evolve(env.ops, linear_cross_entropy=loss))

    config = config_of(sources, tmp_path, "poisoned")
    config = attrs.evolve(config, validation=attrs.evolve(config.validation, every=9))
    told = train(as_world(config, 2, experts=1), tmp_path / "out", {1: run.World(env=poisoned)})
    assert [code for code, _ in told] == [0, 0], told
    folder = tmp_path / "runs" / "poisoned"
    assert [line["nonfinite_steps"] for line in lines(folder) if "loss" in line] == [0, 1, 1, 1]
    first, second = digests(folder, 1), digests(folder, 2)
    assert {name for name in first if first[name] != second[name]} == {"skipped", "skipped_in_row"}
    assert [line["update_norm"] for line in lines(folder) if "loss" in line][1] == 0


def test_a_signal_to_one_rank_stops_all_after_the_same_step(sources: Path, tmp_path: Path) -> None:
    def struck(read: Callable[[int], Batch]) -> Callable[[int], Batch]:
        def strike(cursor: int) -> Batch:
            if cursor == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return read(cursor)

        return strike

    config = config_of(sources, tmp_path, "struck", steps=1000)
    told = train(as_world(config, 2, experts=1), tmp_path / "out", {1: run.World(read=struck)})
    assert [code for code, _ in told] == [75, 75], told
    folder = tmp_path / "runs" / "struck"
    assert digests(folder, 2) and lines(folder)[-1]["step"] == lines(folder, rank=1)[-1]["step"] == 2


def test_too_many_rows_for_a_rank_end_the_run_on_all_with_what_it_takes(sources: Path, tmp_path: Path) -> None:
    config = as_world(config_of(sources, tmp_path, "small", steps=9), 2, experts=2, capacity=1.0)
    told = train(config, tmp_path / "out")
    for rank, (code, text) in enumerate(told):
        assert code == 2 and f"nmoe: rank {rank}, step 0: parallel.capacity: " in text, told
        assert "set it to 1." in text
    assert json.loads((tmp_path / "runs/small/events.jsonl").read_text().splitlines()[-1])["exit_code"] == 2


def test_ranks_with_different_configs_are_refused_by_name(sources: Path, tmp_path: Path) -> None:
    config = as_world(config_of(sources, tmp_path, "x"), 2, experts=1)
    other = attrs.evolve(config, train=attrs.evolve(config.train, z_loss=0.5))
    told = train(config, tmp_path / "out", rank1=other)
    assert [code for code, _ in told] == [2, 2] and told[1][1].strip() == ""
    assert told[0][1] == (
        "nmoe: rank 1: expected train.z_loss as on rank 0, 0.0, got 0.5; start all ranks with the same code, config "
        "and data\n"
    )
    assert not (tmp_path / "runs").exists()


def test_hosts_of_unequally_many_ranks_are_refused_by_name(sources: Path, tmp_path: Path) -> None:
    """As of hosts with another number of GPUs; before a folder is made."""
    config = as_world(config_of(sources, tmp_path, "x"), 2, experts=1)

    def call(rank: int) -> int:
        os.environ["LOCAL_WORLD_SIZE"] = str(1 + rank)
        return run.main(config, {}, ("nmoe", "run"), "x")

    told = on_ranks(2, tmp_path / "out", call)
    assert [code for code, _ in told] == [2, 2] and told[1][1].strip() == ""
    assert told[0][1] == (
        "nmoe: parallel.ranks: expected equally many ranks on every host, got 1 where rank 0 is and 2 where rank 1 is; "
        "start as many on each\n"
    )
    assert not (tmp_path / "runs").exists()


def test_what_goes_wrong_on_one_rank_is_told_once_with_its_number(tmp_path: Path, sources: Path) -> None:
    config = as_world(config_of(sources, tmp_path, "x"), 2, experts=1)

    def act(ranks: Ranks) -> None:
        def fail() -> None:
            if ranks.world.rank == 1:
                raise InputError("disk: has room, got none; make room")

        with pytest.raises(InputError) as caught:
            meeting.on_all_ranks(ranks, fail)
        assert caught.value.problems == (() if ranks.world.rank else ("rank 1: disk: has room, got none; make room",))
        assert ranks.all_reduce_max([ranks.world.rank, 7]) == [1, 7]
        (total,) = meeting.all_reduce_sum(ranks.world, [torch.tensor([0.25, ranks.world.rank + 1])])
        assert total.tolist() == [0.5, 3.0]

    in_group(config, tmp_path / "out", act)


def refused(text: str, *says: str) -> None:
    assert text.startswith("nmoe: ") and text.count("\n") == 1 and all(each in text for each in says), text


def test_a_rank_that_does_not_come_is_named(sources: Path, tmp_path: Path) -> None:
    config = as_world(config_of(sources, tmp_path, "x"), 3, experts=1)
    config = attrs.evolve(config, parallel=attrs.evolve(config.parallel, timeout_s=4.0))

    def call(rank: int) -> int:
        return run.main(config, {}, ("nmoe", "run"), "x")

    for come, missing in (((0, 2), "rank 1"), ((1,), "rank 0")):
        for rank, (code, text) in zip(come, on_ranks(3, tmp_path / "out", call, only=come), strict=True):
            assert code == 2
            # torch may have a word of its own when the meeting point closes
            refused(
                text.splitlines(keepends=True)[-1],
                f"rank {rank}: parallel.ranks: expected all 3 ranks at",
                f"within 4 s, got none of {missing}; ",
            )


def test_a_port_in_use_is_told(sources: Path, tmp_path: Path) -> None:
    config = as_world(config_of(sources, tmp_path, "x"), 2, experts=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def call(rank: int) -> int:
            return run.main(config, {}, ("nmoe", "run"), "x")

        ((code, text),) = on_ranks(2, tmp_path / "out", call, only=(0,), port=port)
    assert code == 2
    refused(text, "rank 0: MASTER_PORT: expected a free port", f":{port}, which is in use")


def test_multicast_and_hosts_are_looked_at_before_anybody_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, other: (here, other) != (0, 1))
    two = environment(0, 2, free_port())
    told = from_environment(two)
    meeting.check_machine(told, 2, "peer", cuda=False)
    problems = problems_of(lambda: meeting.check_machine(told, 2, "peer", cuda=True))
    assert len(problems) == 2 and "export TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1" in problems[0]
    assert "NCCL_NVLS_ENABLE=0" in problems[0] and problems[1].startswith(
        "GPU 0: expected direct access (P2P) to GPU 1"
    )
    on = from_environment({**two, **MULTICAST_OFF, "NCCL_NVLS_ENABLE": "1"})
    assert "NCCL_NVLS_ENABLE=0" in problems_of(lambda: meeting.check_machine(on, 1, "peer", cuda=True))[0]
    meeting.check_machine(from_environment({**two, **MULTICAST_OFF}), 1, "peer", cuda=True)
    hosts = from_environment({**environment(0, 16, free_port()), "LOCAL_WORLD_SIZE": "8"})
    for experts, transport, said in (
        (16, "peer", "--parallel.experts=8, or --parallel.transport=proxy"),
        (3, "peer", "expected a divisor of the 8 ranks"),
        (3, "proxy", "expected a divisor of the 8 ranks"),
        (12, "proxy", "expected a multiple of the 8 ranks"),
    ):
        (problem,) = problems_of(partial(meeting.check_machine, hosts, experts, transport, cuda=False))
        assert said in problem
    meeting.check_machine(hosts, 16, "proxy", cuda=False)


def problems_of(act: Callable[[], None]) -> Sequence[str]:
    with pytest.raises(InputError) as caught:
        act()
    return caught.value.problems
