"""`nmoe plan`: print what a config will cost."""

from __future__ import annotations

import json

import attrs

from nmoe.config import Config
from nmoe.effects.log import say
from nmoe.errors import InputError
from nmoe.pure.plan import Plan, plan

__all__ = ["duration", "main", "quantity", "render"]


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


def render(config: Config, planned: Plan) -> str:
    """The plan as a screenful of text."""
    c, train = config.model, config.train
    flops, memory = planned.flops, planned.memory
    forward = flops.total()
    mixtures = c.num_layers - c.num_dense_layers
    parts = "  ".join(f"{name} {100 * value / forward:.1f} %" for name, value in attrs.asdict(flops).items() if value)
    kinds = "  ".join(f"{name} {quantity(value, 'B')}" for name, value in attrs.asdict(memory).items() if value)
    lines = (
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
        ("memory a rank", f"{quantity(memory.total(), 'B')}  (activations are an estimate)"),
        ("", kinds),
        (
            "checkpoint",
            f"{quantity(planned.checkpoint, 'B')}  written from one copy of {quantity(planned.staging, 'B')} in each "
            "rank's host memory",
        ),
        ("tokens", f"{quantity(planned.tokens)}  {train.steps} steps of {quantity(planned.tokens_per_step)}"),
        (
            "time",
            f"{duration(planned.seconds())} at {100 * planned.mfu:.0f} % of "
            f"{quantity(planned.peak_flops, 'FLOP/s')} a rank: "
            f"{quantity(planned.tokens_per_second())} tokens/s, {quantity(planned.flop_total, 'FLOP')} in all",
        ),
    )
    return "\n".join(f"{name:<14} {text}" for name, text in lines)


def main(config: Config, ranks: int, mfu: float, as_json: bool) -> int:
    """Print the plan of `config` on `ranks` ranks of an H100 or H200 at `mfu`."""
    if ranks < 1:
        raise InputError(f"--gpus: at least 1, got {ranks}; say how many ranks to plan for")
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu: a share above 0 and at most 1, got {mfu}; 0.4 is a good start")
    planned = plan(config, ranks=ranks, mfu=mfu)
    if as_json:
        numbers = attrs.asdict(planned)
        numbers["tokens_per_second"] = planned.tokens_per_second()
        numbers["seconds"] = planned.seconds()
        say(json.dumps(numbers, indent=2))
    else:
        say(render(config, planned))
    return 0
