"""Many GPUs: what is held and sent adds up over ranks, and times are those worked out by hand."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.config import Config, load
from nmoe.pure.core import tree
from nmoe.pure.core.spec import POLICY
from nmoe.pure.cost.machines import H200, Link
from nmoe.pure.cost.plan import plan
from nmoe.pure.cost.scale import Arrangement, best, choices, scale
from nmoe.pure.cost.traffic import Traffic, distinct_ranks
from nmoe.pure.model import model
from nmoe.pure.model.blueprint import make_blueprint
from tests.configs import ROOT
from tests.effects.train.tiny import tiny

DSV3 = load(ROOT / "configs" / "dsv3.toml", {}, ()).config


def arranged(gpus: int, hosts: int, expert_ranks: int, *, dedup: bool = False, capacity: float = 2.0) -> Arrangement:
    return Arrangement(gpus=gpus, hosts=hosts, expert_ranks=expert_ranks, dedup=dedup, capacity=capacity)


def parameter_bytes(config: Config, shard: str, *, gradients: bool = False) -> int:
    """Of all parameters that are sharded by this axis, or by none, in bf16; or of their gradients, in fp32."""
    specs, dims = model.specs(config.model), model.dims(config.model)
    policies = [(spec.size(dims), POLICY[spec.role]) for _, spec in tree.leaves(specs)]
    wide = (4 if gradients or policy.storage == "fp32" else 2 for _, policy in policies)
    return sum(size * element for element, (size, policy) in zip(wide, policies, strict=True) if policy.shard == shard)


@pytest.mark.parametrize(
    ("gpus", "hosts", "num_experts", "expected"),
    [
        (256, 32, 256, (8, 16, 32, 64, 128, 256)),
        (80, 10, 160, (8, 16, 40, 80)),
        (8, 1, 64, (8,)),
        (16, 2, 8, (8,)),
        (12, 2, 8, (2,)),
        (4, 4, 6, (1, 2)),
        (1, 1, 64, (1,)),
    ],
)
def test_choices_are_within_a_host_or_on_whole_hosts(
    gpus: int, hosts: int, num_experts: int, expected: tuple[int, ...]
) -> None:
    assert choices(gpus=gpus, hosts=hosts, num_experts=num_experts) == expected


def test_one_gpu_waits_for_nobody() -> None:
    config = tiny(compute="bf16")
    alone = scale(config, arranged(1, 1, 1, dedup=True), H200, mfu=0.4)
    assert alone.dispatch == alone.combine == alone.reduce == alone.gather == Traffic(inside=0.0, between=0.0)
    assert alone.step_s() == alone.compute_s and alone.mfu() == 0.4
    assert alone.plan == plan(config, make_blueprint(config), mfu=0.4, dedup=True)
    assert alone.plan.memory.exchange == 0
    assert alone.tokens_per_second() == pytest.approx(alone.plan.tokens_per_second())


def test_exchanges_of_deepseek_v3_by_hand() -> None:
    """58 mixtures, blocks computed again, 4096 tokens of 8 choices and 7168 bf16 values a GPU."""
    inside = scale(DSV3, arranged(256, 32, 8), H200, mfu=0.4)
    assert inside.dispatch == inside.combine == Traffic(inside=411_041_792.0, between=0.0)
    assert (inside.dispatches, inside.combines) == (58 * 4, 58 * 3)
    row_s, alpha = 411_041_792 / 350e9, 7.5e-6
    counts_s = alpha + 4 * (256 + 8) * 7 / 350e9
    # two forward passes; one backward pass with rows and gradients in one exchange; rows come back during the product
    product_s = 2 * 4096 * 8 * 7168 * 2048 / (0.4 * H200.peak_flops)
    assert product_s > row_s and inside.combine_exposed_s == alpha < inside.combine_s
    by_hand = 58 * (2 * (counts_s + (alpha + row_s) + alpha) + (alpha + 2 * row_s) + alpha)
    assert inside.exchange_s == pytest.approx(by_hand)
    faster = scale(DSV3, arranged(256, 32, 8), H200, mfu=1.0)
    assert faster.combine_exposed_s == pytest.approx(alpha + row_s - 0.4 * product_s)
    across = scale(DSV3, arranged(256, 32, 256), H200, mfu=0.4)
    assert across.combine_exposed_s == across.combine_s
    assert across.dispatch == Traffic(inside=4096 * 8 * 14336 * 7 / 256, between=4096 * 8 * 14336 * 248 / 256)
    assert across.dispatch_s == pytest.approx(400e-6 + across.dispatch.between / 45e9)


def test_rows_that_cross_once_to_a_host_by_hand() -> None:
    """Eight hosts of eight GPUs: a token of four groups of experts, each a host, is in 3.7 hosts on average."""
    found = scale(DSV3, arranged(256, 32, 64), H200, mfu=0.4)
    reached = distinct_ranks(num_experts=256, top_k=8, ranks=8, num_groups=8, top_k_groups=4)
    crossing, passed_on = 4096 * reached * 14336 * 7 / 8, 4096 * 8 * 14336 * 56 / 64 * 7 / 8
    assert found.once.between == pytest.approx(crossing) and crossing < found.dispatch.between / 2
    assert found.once.inside == pytest.approx(found.dispatch.inside + passed_on)
    assert found.once_s == pytest.approx(400e-6 + crossing / 45e9 + 7.5e-6 + passed_on / 350e9)
    assert found.once_step_s() - found.step_s() == pytest.approx(found.once_exchange_s - found.exchange_s)
    assert found.once_exchange_s < found.exchange_s
    near = scale(DSV3, arranged(256, 32, 8), H200, mfu=0.4)
    assert near.once == near.dispatch and near.once_exchange_s == pytest.approx(near.exchange_s)


def test_only_the_way_to_the_experts_is_deduplicated() -> None:
    plain, once = (scale(DSV3, arranged(256, 32, 8, dedup=dedup), H200, mfu=0.4) for dedup in (False, True))
    assert once.combine == plain.combine
    assert once.dispatch.inside == pytest.approx(plain.dispatch.inside * once.plan.distinct / 8)
    assert once.step_s() < plain.step_s()


@pytest.mark.parametrize(
    ("expert_ranks", "copies_inside", "copies_between"),
    # what a GPU sends of its experts' gradients, in shares of them: copies on 32 hosts; on 16 hosts; none
    [(8, 0, 31 / 32), (16, 0, 15 / 16), (256, 0, 0)],
)
def test_gradients_and_parameters_of_deepseek_v3_by_hand(
    expert_ranks: int, copies_inside: float, copies_between: float
) -> None:
    found = scale(DSV3, arranged(256, 32, expert_ranks), H200, mfu=0.4)
    for traffic, gradients in ((found.gather, False), (found.reduce, True)):
        dense = parameter_bytes(DSV3, "", gradients=gradients)
        experts = parameter_bytes(DSV3, "E", gradients=gradients) / expert_ranks
        inside = dense * 255 / 256 * 7 / 8 + experts * copies_inside
        between = dense * 255 / 256 / 8 + experts * copies_between
        assert traffic.inside == pytest.approx(inside, rel=1e-5)
        assert traffic.between == pytest.approx(between, rel=1e-5)
    shared = max(20e-6 + dense * 255 / 256 * 7 / 8 / 250e9, 400e-6 + dense * 255 / 256 / 8 / 45e9)
    own = 400e-6 + experts * copies_between / 45e9 if copies_between else 0
    assert found.reduce_s == pytest.approx(shared + own, rel=1e-5)


def test_copies_within_a_host_are_reduced_there() -> None:
    config = tiny(compute="bf16", batch_size=8)
    found = scale(config, arranged(4, 1, 2), H200, mfu=0.4)
    dense, experts = parameter_bytes(config, ""), parameter_bytes(config, "E") / 2
    assert found.gather.between == 0
    padding = 10 * 128 * 4
    assert experts > 2 * padding
    assert found.gather.inside == pytest.approx(dense * 3 / 4 + experts / 2, abs=padding)


def test_what_computing_does_not_hide_is_waited_for() -> None:
    config = tiny(compute="bf16", batch_size=16)
    slow = attrs.evolve(H200, collective=Link(alpha_s=1.0, bytes_per_s=1e9, source="test"))
    found = scale(config, arranged(4, 1, 4), slow, mfu=1e-10)
    assert found.plan.microbatches == 2
    assert found.compute_s / 2 > 10 and found.reduce_exposed_s == found.gather_exposed_s == 0 < found.gather_s
    fast = scale(config, arranged(4, 1, 4), slow, mfu=1e-6)
    assert fast.reduce_exposed_s == pytest.approx(fast.reduce_s - fast.compute_s / 2 * 2 / 3)
    assert fast.gather_exposed_s == pytest.approx(fast.gather_s - fast.compute_s / 2 / 3) and fast.gather_s > 0.5
    waited = fast.exchange_s + fast.reduce_exposed_s + fast.gather_exposed_s
    assert fast.step_s() == pytest.approx(fast.compute_s + waited)
    assert fast.mfu() < fast.plan.mfu


def test_each_microbatch_is_exchanged() -> None:
    config = tiny(compute="bf16", batch_size=16)
    found = scale(config, arranged(2, 1, 2), H200, mfu=0.4)
    assert (found.plan.microbatches, found.dispatches, found.combines) == (4, 4 * 2 * 3, 4 * 2 * 2)


ARRANGEMENTS = st.sampled_from(
    [(1, 1, 1), (2, 1, 1), (2, 1, 2), (4, 1, 2), (4, 2, 4), (8, 2, 4), (8, 4, 2), (8, 1, 8), (8, 8, 1)]
)


@settings(max_examples=25)
@given(ARRANGEMENTS, st.booleans(), st.booleans())
def test_ranks_hold_the_whole_between_them(shape: tuple[int, int, int], dedup: bool, bf16: bool) -> None:
    config = tiny(compute="bf16" if bf16 else "fp32", batch_size=16)
    gpus, _, expert_ranks = shape
    one = plan(config, make_blueprint(config), mfu=0.4)
    many = scale(config, arranged(*shape, dedup=dedup), H200, mfu=0.4).plan
    assert (many.ranks, many.expert_ranks) == (gpus, expert_ranks)
    assert many.checkpoint == one.checkpoint
    # parameters and every rank's share of an arena end on whole lines of 128 elements
    lines = 20 + 6 * gpus
    padding = gpus * lines * 128 * 8
    assert many.staging * gpus == pytest.approx(one.staging, abs=2 * padding)
    assert many.memory.moments * gpus == pytest.approx(one.memory.moments, abs=padding)
    dense, experts = ((parameter_bytes(config, axis) if bf16 else 0) for axis in ("", "E"))
    if bf16:
        assert many.memory.parameters == pytest.approx(dense + experts / expert_ranks, abs=lines * 128 * 4)


def test_the_best_is_the_fastest_that_fits() -> None:
    machine = attrs.evolve(H200, memory=180e9)
    all_of_them = tuple(
        scale(DSV3, arranged(256, 32, ranks, dedup=dedup), machine, mfu=0.4)
        for ranks in choices(gpus=256, hosts=32, num_experts=256)
        for dedup in (False, True)
    )
    taken = best(all_of_them)
    assert taken.fits()
    assert all(not each.fits() or each.step_s() >= taken.step_s() for each in all_of_them)
    assert any(each.step_s() < taken.step_s() for each in all_of_them)
    none = tuple(attrs.evolve(each, machine=attrs.evolve(H200, memory=1e9)) for each in all_of_them)
    assert best(none).plan.memory.total() == min(each.plan.memory.total() for each in all_of_them)


def test_experts_far_away_need_room_for_rows_that_may_come() -> None:
    """On one GPU an expert's rows are known; with ranks there is room for `capacity` times as many."""
    near, far, wide = (
        scale(DSV3, arranged(256, 32, ranks, capacity=capacity), H200, mfu=0.4).plan.memory.activations
        for ranks, capacity in ((1, 2.0), (8, 2.0), (8, 4.0))
    )
    pair = (
        3 * 2048 + 7168
    ) * 2 + 2 * 2048 * 2  # gradients and activation of one at a time, pre-activation of one layer
    assert far - near == pytest.approx(4096 * 8 * pair, rel=0.06)
    assert wide - far == pytest.approx(2 * (far - near), rel=1e-6)
