"""What a training takes on many GPUs: who holds which experts, what crosses which wire, how long a step is.

Assumed: even routing; a GPU waits for every exchange of rows, but for those that the product which makes them stores at
other GPUs of its host itself, beyond the time of that product; gradients are reduced behind the backward pass of the
last microbatch, parameters gathered behind the forward pass of the first; what does not fit there is waited for.
"""

from __future__ import annotations

import math

import attrs

from nmoe.config.sections import Config
from nmoe.pure.cost import traffic
from nmoe.pure.cost.machines import Machine
from nmoe.pure.cost.plan import Plan, plan
from nmoe.pure.cost.traffic import Traffic
from nmoe.pure.formats import e4m3
from nmoe.pure.model.blueprint import make_blueprint


@attrs.frozen(kw_only=True)
class Arrangement:
    """Who holds which experts.

    Ranks are numbered host by host; each run of `expert_ranks` of them holds one whole set of experts.
    """

    gpus: int
    hosts: int  # divides gpus
    expert_ranks: int  # divides gpus; divides the GPUs of a host, or is a multiple of them
    dedup: bool
    capacity: float

    def per_host(self) -> int:
        """GPUs of a host."""
        return self.gpus // self.hosts

    def expert_hosts(self) -> int:
        """Hosts that one set of experts lies on."""
        return math.ceil(self.expert_ranks / self.per_host())

    def copies(self) -> int:
        """Sets of experts."""
        return self.gpus // self.expert_ranks


@attrs.frozen(kw_only=True)
class Scaled:
    """A plan with what GPUs say to each other; seconds and bytes are of one GPU."""

    arrangement: Arrangement
    machine: Machine
    plan: Plan
    dispatch: Traffic  # one exchange of rows to their experts in the forward pass, of one microbatch and layer
    dispatch_s: float
    again: Traffic  # in the backward pass: rows again, beside their gradients
    again_s: float
    combine: Traffic  # and back
    combine_s: float
    combine_exposed_s: float  # of this, not hidden by the product that makes the rows
    dispatches: int  # a step; two of a backward pass among them where rows cross in one format
    combines: int
    exchange_s: float  # a step, in all
    once: Traffic  # a dispatch whose rows cross once to each host, which passes them on
    once_s: float
    once_exchange_s: float  # a step, in all, with such dispatches
    reduce: Traffic  # gradients, a step
    reduce_s: float
    reduce_exposed_s: float  # of these, not hidden by the backward pass
    gather: Traffic  # parameters, a step
    gather_s: float
    gather_exposed_s: float  # of these, not hidden by the forward pass
    compute_s: float  # a step

    def step_s(self) -> float:
        """Of one step."""
        return self.compute_s + self.exchange_s + self.reduce_exposed_s + self.gather_exposed_s

    def once_step_s(self) -> float:
        """Of one step whose rows cross once to each host."""
        return self.step_s() - self.exchange_s + self.once_exchange_s

    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.plan.tokens_per_step / self.step_s()

    def seconds(self) -> float:
        """Of the whole training."""
        return self.plan.tokens / self.tokens_per_second()

    def mfu(self) -> float:
        """Of the whole step."""
        return self.plan.mfu * self.compute_s / self.step_s()

    def fits(self) -> bool:
        """Whether a GPU has the memory."""
        return self.plan.memory.total() <= self.machine.memory


def choices(*, gpus: int, hosts: int, num_experts: int) -> tuple[int, ...]:
    """Numbers of GPUs that can share out one set of experts: within a host, and over ever more whole hosts."""
    per_host = gpus // hosts
    wider = (per_host * n for n in range(2, hosts + 1) if hosts % n == 0)
    return (math.gcd(per_host, num_experts), *(ranks for ranks in wider if num_experts % ranks == 0))


def scale(config: Config, a: Arrangement, machine: Machine, *, mfu: float) -> Scaled:
    """What training this config takes, arranged like this.

    mfu   of a GPU that waits for no other, causal count
    """
    c = config.model
    blueprint = make_blueprint(config, a.gpus, a.expert_ranks)
    planned = plan(
        config,
        blueprint,
        mfu=mfu,
        peak_flops=machine.peak_flops,
        dedup=a.dedup,
        capacity=a.capacity,
    )
    tokens = config.train.microbatch_size * config.train.sequence_length
    row_bytes = c.hidden_size * (4 if config.precision.compute == "fp32" else 2)
    near = min(a.expert_ranks, a.per_host())
    copies_sent = planned.distinct if a.dedup else c.moe.top_k
    sizes = {"row_bytes": row_bytes, "ranks": a.expert_ranks, "ranks_per_host": near}
    codes = config.precision.kernels_fp8()
    sent_bytes = 4 * e4m3.row_words(c.hidden_size) if codes else row_bytes
    dispatch = traffic.exchange(rows=tokens * copies_sent, **(sizes | {"row_bytes": sent_bytes}))
    again = traffic.exchange(rows=tokens * copies_sent, **(sizes | {"row_bytes": 2 * row_bytes}))
    combine = traffic.exchange(rows=tokens * c.moe.top_k, **sizes)
    words = 4.0 * (c.moe.num_experts + a.expert_ranks)  # rows for each expert, tokens for each rank, sent to all
    counts = Traffic(inside=words * (near - 1), between=words * (a.expert_ranks - near))
    passes = 2 if config.train.recompute == "full" else 1  # forward
    layers = planned.microbatches * len(c.mixtures())
    dispatch_s, combine_s, counts_s, again_s = (
        traffic.exchange_seconds(moved, machine) for moved in (dispatch, combine, counts, again)
    )
    product_s = 2 * tokens * c.moe.top_k * c.hidden_size * c.moe.intermediate_size / (machine.peak_flops * mfu)
    hidden_s = product_s if a.expert_hosts() == 1 else 0.0
    combine_exposed_s = min(combine_s, max(machine.push.alpha_s, combine_s - hidden_s))
    once, once_s = _once(config, a, machine, sent_bytes, copies_sent)
    _, once_again_s = _once(config, a, machine, 2 * row_bytes, copies_sent)

    dense, experts = 0, 0
    dense_parameters, expert_parameters = 0, 0
    for arena in blueprint.layouts:
        # between hosts NCCL sums, and what it sums in fp32 it moves in fp32
        element = 4 if a.hosts > 1 else arena.gradient.itemsize
        gradient, parameter = arena.size * element, arena.size * arena.storage.itemsize
        if arena.policy.shard:
            experts, expert_parameters = experts + gradient, expert_parameters + parameter
        else:
            dense, dense_parameters = dense + gradient, dense_parameters + parameter
    reduce, reduce_s = _collectives(a, machine, dense, experts)
    gather, gather_s = _collectives(a, machine, dense_parameters, expert_parameters)
    compute_s = planned.tokens_per_step / planned.tokens_per_second()
    microbatch_s = compute_s / planned.microbatches
    return Scaled(
        arrangement=a,
        machine=machine,
        plan=planned,
        dispatch=dispatch,
        dispatch_s=dispatch_s,
        combine=combine,
        combine_s=combine_s,
        combine_exposed_s=combine_exposed_s,
        again=again,
        again_s=again_s,
        dispatches=layers * (passes if codes else passes + 2),
        combines=layers * (passes + 1),
        exchange_s=layers * (passes * (counts_s + dispatch_s) + again_s + (passes + 1) * combine_exposed_s),
        once=once,
        once_s=once_s,
        once_exchange_s=layers * (passes * (counts_s + once_s) + once_again_s + (passes + 1) * combine_exposed_s),
        reduce=reduce,
        reduce_s=reduce_s,
        reduce_exposed_s=max(0.0, reduce_s - microbatch_s * 2 / 3),
        gather=gather,
        gather_s=gather_s,
        gather_exposed_s=max(0.0, gather_s - microbatch_s / 3),
        compute_s=compute_s,
    )


def _once(
    config: Config, a: Arrangement, machine: Machine, row_bytes: int, copies_sent: float
) -> tuple[Traffic, float]:
    """A dispatch whose rows cross once to each host, and its time.

    What crossed is passed on inside the host when it has arrived.

    copies_sent  of a row, to all GPUs
    """
    c, hosts = config.model, a.expert_hosts()
    tokens = config.train.microbatch_size * config.train.sequence_length
    sizes = {"row_bytes": row_bytes, "ranks": a.expert_ranks, "ranks_per_host": min(a.expert_ranks, a.per_host())}
    direct = traffic.exchange(rows=tokens * copies_sent, **sizes)
    if hosts == 1:
        return direct, traffic.exchange_seconds(direct, machine)
    reached = traffic.distinct_ranks(
        num_experts=c.moe.num_experts,
        top_k=c.moe.top_k,
        ranks=hosts,
        num_groups=c.moe.num_groups,
        top_k_groups=c.moe.top_k_groups,
    )
    crossing = traffic.exchange(rows=tokens * reached, row_bytes=row_bytes, ranks=hosts, ranks_per_host=1).between
    passed_on = traffic.forwarded(rows=tokens * copies_sent, **sizes)
    first = Traffic(inside=direct.inside, between=crossing)
    seconds = traffic.exchange_seconds(first, machine) + machine.push.seconds(passed_on)
    return Traffic(inside=direct.inside + passed_on, between=crossing), seconds


def _collectives(a: Arrangement, machine: Machine, dense: int, experts: int) -> tuple[Traffic, float]:
    """One collective over all GPUs for what all of them hold, one over the copies of a set of experts for these."""
    per_host = max(1, a.per_host() // a.expert_ranks)
    over_all = traffic.collective(num_bytes=dense, ranks_per_host=a.per_host(), hosts=a.hosts)
    over_copies = traffic.collective(num_bytes=experts, ranks_per_host=per_host, hosts=a.copies() // per_host)
    both = Traffic(inside=over_all.inside + over_copies.inside, between=over_all.between + over_copies.between)
    return both, sum(traffic.collective_seconds(moved, machine) for moved in (over_all, over_copies))


def best(candidates: tuple[Scaled, ...]) -> Scaled:
    """The fastest that fits; if none does, the smallest."""
    fitting = [candidate for candidate in candidates if candidate.fits()]
    if fitting:
        return min(fitting, key=Scaled.step_s)
    return min(candidates, key=lambda candidate: candidate.plan.memory.total())
