"""A plan as text."""

from __future__ import annotations

import attrs

from nmoe.config import Config
from nmoe.pure.cost.plan import Plan

Line = tuple[str, str]
"""What a line is about, and what it says."""

PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix, as in `6.93 GB`; a bare count of billions is `6.93 B`."""
    for limit, prefix in PREFIXES:
        if abs(number) >= limit:
            scaled = number / limit
            digits = f"{scaled:.3g}" if scaled < 999.5 else f"{scaled:.0f}"
            return f"{digits} {'B' if prefix == 'G' and not unit else prefix + unit}"
    return f"{number:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as `h:mm:ss`, with days in front where there are any."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def aligned(*lines: Line) -> str:
    """Lines with what they are about in a column."""
    return "\n".join(f"{name:<14} {text}" for name, text in lines)


def render(config: Config, planned: Plan) -> str:
    """The plan of ranks that wait for nobody."""
    return aligned(
        *about(config, planned),
        (
            "time",
            f"{duration(planned.seconds())} at {100 * planned.mfu:.0f} % of "
            f"{quantity(planned.peak_flops, 'FLOP/s')} a rank: "
            f"{quantity(planned.tokens_per_second())} tokens/s, {quantity(planned.flop_total, 'FLOP')} in all",
        ),
    )


def about(config: Config, planned: Plan) -> tuple[Line, ...]:
    """What is trained, and what it takes of each rank."""
    c, train = config.model, config.train
    flops, memory = planned.flops, planned.memory
    forward = flops.total()
    mixtures = c.num_layers - c.num_dense_layers
    parts = "  ".join(f"{name} {100 * value / forward:.1f} %" for name, value in attrs.asdict(flops).items() if value)
    kinds = [f"{name} {quantity(value, 'B')}" if value else "" for name, value in attrs.asdict(memory).items()]
    return (
        (
            "model",
            f"{c.num_layers} layers ({c.num_dense_layers} dense, {mixtures} mixture)  hidden {c.hidden_size}  "
            f"{c.attention.num_heads} heads  {c.moe.num_experts} experts, top {c.moe.top_k}, "
            f"{c.moe.num_shared_experts} shared",
        ),
        (
            "parameters",
            f"{quantity(planned.parameters.total)} total  {quantity(planned.parameters.active)} active a token  "
            f"{quantity(planned.parameters.routed)} routed  {quantity(planned.parameters.embedding)} embedding",
        ),
        (
            "FLOPs a token",
            f"{quantity(flops.training(), 'FLOP')} training  {quantity(forward, 'FLOP')} forward (causal)  "
            f"{quantity(planned.flops_executed.training(), 'FLOP')} training with the whole attention square",
        ),
        ("", parts),
        (
            "ranks",
            f"{planned.ranks}  experts over {planned.expert_ranks}  {planned.microbatches} microbatches of "
            f"{train.microbatch_size} x {train.sequence_length} a rank",
        ),
        ("memory a rank", f"{quantity(memory.total(), 'B')}  {'  '.join(filter(None, kinds[:4]))}"),
        ("", f"{'  '.join(filter(None, kinds[4:]))}  (activations are an estimate)"),
        (
            "checkpoint",
            f"{quantity(planned.checkpoint, 'B')}  written from one copy of {quantity(planned.staging, 'B')} in each "
            "rank's host memory",
        ),
        ("tokens", f"{quantity(planned.tokens)}  {train.steps} steps of {quantity(planned.tokens_per_step)}"),
    )
