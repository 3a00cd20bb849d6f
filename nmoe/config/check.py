"""What the numbers of a config have to fulfil, each alone and together."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from nmoe.config.attention import Rules
from nmoe.config.fields import Key, KeyPath, walk
from nmoe.config.run_name import RULE, is_run_name
from nmoe.config.sections import MOST_TOKENS, Config, Mla, Model, Moe, Stdlib, Train
from nmoe.config.setting import divides
from nmoe.config.toml import dotted, shown

GPUS_PER_HOST = 8
"""Of every host with H100, H200 or B200 that is sold."""

ITEM_BYTES = MappingProxyType({"fp32": 4, "bf16": 2})

LOW_BLOCK = 128
"""What hidden size and expert size are multiples of in fp8, MXFP8 and NVFP4: the largest block of values that share a
scale, and the unit in which Blackwell lays scales out."""


def validate(config: Config, world: int) -> tuple[str, ...]:
    """What is wrong with a config for `world` ranks, each `<path>: expected <what>, got <value>; <remedy>`."""
    return (
        *(f"{dotted(path)}: {text}" for path, text in out_of_bounds(config)),
        *_model(config.model),
        *_moe(config.model.moe),
        *_balance(config.model.moe),
        *_parallel(config, world),
        *config.model.attention.problems("model.attention", config.model.num_layers, config.model.max_positions),
        *kernel_sizes(
            config.model, device="cpu" if _plain(config) else config.run.device, compute=config.precision.storage()
        ),
        *_optimizers(config),
        *_precision(config),
        *_low_precision(config, world),
        *_length(config),
        *_schedule(config),
        *_run(config, world),
    )


def validate_model(c: Model) -> tuple[str, ...]:
    """What is wrong with a model that has no config around it, in the form of `validate`."""
    bounds = (f"model.{dotted(path)}: {text}" for path, text in out_of_bounds(c))
    return (
        *bounds,
        *_model(c),
        *_moe(c.moe),
        *c.attention.problems("model.attention", c.num_layers, c.max_positions),
    )


def unrunnable(config: Config, world: int) -> tuple[str, ...]:
    """What `nmoe plan` can say the cost of and `nmoe run` refuses, on `world` ranks, in the form of `validate`."""
    experts = config.parallel.experts or world
    if config.run.device != "cuda" or experts <= GPUS_PER_HOST or config.parallel.transport != "peer":
        return ()
    return beyond_hosts(experts, GPUS_PER_HOST, config.parallel.transport)


def beyond_hosts(expert_ranks: int, per_host: int, transport: str) -> tuple[str, ...]:
    """What keeps `expert_ranks` neighbouring ranks from exchanging rows on hosts of `per_host` ranks, in the form of
    `validate`."""
    if expert_ranks > per_host and transport == "peer":
        return (
            f"parallel.experts: expected at most the {per_host} ranks of one host, got {expert_ranks}; add "
            f"--parallel.experts={per_host}, or --parallel.transport=proxy, which sends rows to other hosts over TCP",
        )
    if expert_ranks > per_host and expert_ranks % per_host:
        return (
            f"parallel.experts: expected a multiple of the {per_host} ranks of a host, got {expert_ranks}; choose one, "
            "so that experts lie on whole hosts",
        )
    if expert_ranks <= per_host and per_host % expert_ranks:
        return (
            f"parallel.experts: expected a divisor of the {per_host} ranks of a host, got {expert_ranks}; "
            "choose one, so that neighbours are on one host",
        )
    return ()


def remarks(config: Config) -> tuple[str, ...]:
    """What is right in a config and not what one may expect, each `<path>: <what>`."""
    return (
        *_slow(config),
        *map("parallel.transport: {}".format, unproven(config)),
        *(f"schedule.{key}: {text}" for key, text in cut_short(config).items()),
    )


def unproven(config: Config) -> tuple[str, ...]:
    """What to say of a transport between hosts that no network has carried; nothing of another."""
    if config.parallel.transport != "nvshmem":
        return ()
    return ('no network has carried "nvshmem" yet; compare the first steps with those of "proxy"',)


def _slow(config: Config) -> tuple[str, ...]:
    """What a GPU runs as plain torch."""
    if _plain(config):
        return ('run.kernels: "torch" runs every operation of a GPU as plain torch: right, and slow',)
    return tuple(
        f'{where}.kind: "{c.kind}" has no kernels, a GPU runs it as plain torch: right, and slow'
        for where, c in config.model.attentions().items()
        if not c.has_kernels and config.run.device == "cuda"
    )


def cut_short(config: Config) -> dict[str, str]:
    """What to say of a run that ends before its learning rate has risen or begins to decay, by the key that says when;
    nothing of another."""
    c, total = config.schedule_in_tokens(), config.tokens()
    begin = c.warmup_tokens + (c.hold_tokens or 0)
    if total < c.warmup_tokens:
        return {
            "warmup_tokens": f"the run ends at {total:,} tokens, within its warm-up of {c.warmup_tokens:,}; raise "
            "train.steps, or write schedule.warmup"
        }
    if c.decay_tokens and total <= begin:
        return {
            "decay_tokens": f"the run ends at {total:,} tokens, before its decay begins at {begin:,}; raise "
            "train.steps, or write schedule.decay"
        }
    return {}


def fitting(train: Train, world: int) -> dict[str, int]:
    """The nearest batch_size and microbatch_size that `world` ranks share evenly; those alone that have to change.

    A batch that divides among the ranks stays, and with it what is learned; else it becomes the nearest multiple of
    ranks * microbatch_size, or of ranks where it is smaller than that. The microbatch is the largest up to the old one.
    """
    batch, micro = train.batch_size, train.microbatch_size
    if batch % world:
        unit = world * micro if batch >= world * micro else world
        batch = max(1, round(batch / unit)) * unit
    share = batch // world
    micro = next(size for size in range(min(micro, share), 0, -1) if share % size == 0)
    sizes = {"batch_size": batch, "microbatch_size": micro}
    return {key: size for key, size in sizes.items() if size != getattr(train, key)}


def _plain(config: Config) -> bool:
    """Whether a GPU runs plain torch in the place of the kernels."""
    return config.run.device == "cuda" and config.run.kernels == "torch"


def out_of_bounds(section: Any) -> Iterator[tuple[KeyPath, str]]:
    """Every number in a section that its key's bounds exclude, and what it breaks."""
    for path, key, value in walk(section):
        if isinstance(value, int | float) and (text := _bounds(key, value)):
            yield path, text


def _precision(config: Config) -> Iterator[str]:
    if config.precision.compute == "fp32" and config.run.device == "cuda":
        yield (
            'precision.compute: expected "bf16" when run.device is "cuda", got "fp32"; write compute = "bf16" or '
            'device = "cpu"'
        )
    if config.precision.compute == "fp32" and config.precision.moments == "bf16":
        yield (
            'precision.moments: expected "fp32" when precision.compute is "fp32", got "bf16"; write moments = "fp32" '
            'or compute = "bf16"'
        )


def _low_precision(config: Config, world: int) -> Iterator[str]:
    """Where fp8, MXFP8 and NVFP4 can be computed, and for which models."""
    c, moe, p = config.model, config.model.moe, config.precision
    if not p.low():
        if p.emulate:
            yield (
                f'precision.emulate: expected false when precision.compute is "{p.compute}", got true; remove the key, '
                "there is nothing to emulate"
            )
        return
    if p.compute == "fp8" and config.run.device == "cuda":
        # no product of plain torch on a GPU holds a code times its fp32 scale
        if _plain(config):
            yield (
                'precision.compute: expected "bf16", "mxfp8" or "nvfp4" when run.kernels is "torch", got "fp8"; write '
                "one of them, only the kernels multiply in fp8"
            )
        elif p.emulate:
            yield (
                'precision.emulate: expected false when precision.compute is "fp8" on a GPU, got true; remove the key, '
                "kernels multiply in fp8"
            )
    elif not p.emulate:
        yield (
            f'precision.emulate: expected true when precision.compute is "{p.compute}", got false; write emulate = '
            f'true, nothing multiplies in this format on run.device = "{config.run.device}", or compute = "bf16"'
        )
    if not c.mixtures():
        yield (
            f'precision.compute: expected "bf16" for a model without experts, got "{p.compute}"; write it, all other '
            "products stay in bf16"
        )
    if c.mixtures() and not moe.plain():
        got = " and ".join(f"model.moe.{key}" for key in ("biases", "swiglu_limit") if getattr(moe, key))
        yield (
            f'precision.compute: expected "bf16" beside {got}, got "{p.compute}"; write it, experts in fewer bits have '
            "neither"
        )
    for key, size in {"model.hidden_size": c.hidden_size, "model.moe.intermediate_size": moe.intermediate_size}.items():
        if size % LOW_BLOCK:
            yield (
                f'{key}: expected a multiple of {LOW_BLOCK} when precision.compute is "{p.compute}", got {size}; write '
                f"{-(-size // LOW_BLOCK) * LOW_BLOCK}"
            )
    experts = config.parallel.experts or world
    if config.run.device == "cuda" and p.compute != "fp8" and experts > 1:
        yield (
            f'parallel.experts: expected 1 when precision.compute is "{p.compute}", got {experts}; write 1, rows that '
            "GPUs exchange are multiplied in bf16 or fp8"
        )


def _optimizers(config: Config) -> Iterator[str]:
    if config.optim.router.optimizer != "adamw":
        yield (
            f'optim.router.optimizer: expected "adamw", got {shown(config.optim.router.optimizer)}; write "adamw", '
            "a router has no hidden matrix"
        )
    if config.optim.qk_clip is not None and type(config.model.attention) is not Mla:
        yield (
            f'optim.qk_clip: expected model.attention.kind = "mla" beside it, got '
            f"{shown(config.model.attention.kind)}; remove the key, other kinds do not have it"
        )
    if config.optim.muon_heads and config.optim.dense.optimizer != "muon":
        yield (
            f'optim.muon_heads: expected optim.dense.optimizer = "muon" beside it, got '
            f"{shown(config.optim.dense.optimizer)}; remove the key, or write that"
        )


def _bounds(key: Key, value: float) -> str | None:
    """What the value of one key breaks; a NaN breaks every bound."""
    got = f"got {shown(value)}"
    if key.low is not None and not value >= key.low:
        return f"expected at least {key.low}, {got}; raise it"
    if key.above is not None and not value > key.above:
        return f"expected above {key.above}, {got}; raise it"
    if key.high is not None and not value <= key.high:
        return f"expected at most {key.high}, {got}; lower it"
    return None


def _model(c: Model) -> Iterator[str]:
    if c.num_dense_layers > c.num_layers:
        yield (
            f"model.num_dense_layers: expected at most num_layers = {c.num_layers}, got {c.num_dense_layers}; "
            "write num_layers for a dense model"
        )
    if c.num_dense_layers < c.num_layers and c.moe.top_k == 1 and c.moe.normalize:
        yield (
            "model.moe.normalize: expected false when top_k is 1, got true; write normalize = false, the "
            "normalised weight of a single expert is a constant and trains no router"
        )


def _moe(c: Moe) -> Iterator[str]:
    size = c.num_experts // max(c.num_groups, 1)
    if c.top_k > c.num_experts:
        yield f"model.moe.top_k: expected at most num_experts = {c.num_experts}, got {c.top_k}; lower top_k"
    if not divides(c.num_groups, c.num_experts):
        yield (
            f"model.moe.num_groups: expected a divisor of num_experts = {c.num_experts}, got {c.num_groups}; "
            "choose groups of the same size"
        )
    elif c.num_groups > 1 and size < 2:
        yield (
            f"model.moe.num_groups: expected groups of two experts at least, got {c.num_groups} for num_experts = "
            f"{c.num_experts}; lower num_groups, the two best experts of a group rank it"
        )
    if c.top_k_groups > c.num_groups:
        yield (
            f"model.moe.top_k_groups: expected at most num_groups = {c.num_groups}, got {c.top_k_groups}; lower "
            "top_k_groups"
        )
    elif c.num_groups > 1 and size > 1 and c.top_k_groups * size < c.top_k <= c.num_experts:
        yield (
            f"model.moe.top_k: expected at most the {c.top_k_groups * size} experts in top_k_groups = {c.top_k_groups} "
            f"groups, got {c.top_k}; lower top_k or raise top_k_groups"
        )


def _balance(c: Moe) -> Iterator[str]:
    if c.balance == "quantile" and c.num_groups > 1:
        yield (
            f'model.moe.balance: expected "sign" when num_groups is {c.num_groups}, got "quantile"; write balance = '
            '"sign" or num_groups = 1, a quantile does not know which groups a token keeps'
        )
    if c.balance == "quantile" and c.top_k == c.num_experts:
        yield (
            f'model.moe.balance: expected "sign" when top_k is num_experts = {c.num_experts}, got "quantile"; write '
            'balance = "sign", every expert has every token'
        )


def _parallel(config: Config, world: int) -> Iterator[str]:
    experts, num_experts = config.parallel.experts, config.model.moe.num_experts
    if experts is None and not divides(world, num_experts):
        yield (
            f"model.moe.num_experts: expected a multiple of the {world} ranks, got {num_experts}; choose "
            "parallel.ranks so that "
            "each holds the same number of experts, or fewer that share them out as parallel.experts"
        )
    if _plain(config) and (experts or world) > 1:
        yield (
            f'parallel.experts: expected 1 when run.kernels is "torch", got {experts or world}; write 1, so that each '
            "rank holds all experts: only the kernels exchange rows among GPUs"
        )
    if config.parallel.transport == "nvshmem" and config.run.device == "cpu":
        yield (
            'parallel.transport: expected "peer" or "proxy" when run.device is "cpu", got "nvshmem"; write one of '
            "them, NVSHMEM joins GPUs"
        )
    if config.train.graph and config.parallel.transport == "proxy":
        yield (
            'train.graph: expected false when parallel.transport is "proxy", got true; write false, a thread sends '
            "while the step is recorded"
        )
    if 0 < config.parallel.capacity < 1:
        yield (
            f"parallel.capacity: expected 0 or at least 1, got {shown(config.parallel.capacity)}; below the mean some "
            "rank always has too many rows"
        )
    if experts is not None and not divides(experts, num_experts):
        yield (
            f"parallel.experts: expected a divisor of model.moe.num_experts = {num_experts}, got {experts}; choose "
            "one, so that each rank holds the same number of experts"
        )
    if experts is not None and not divides(experts, world):
        yield (
            f"parallel.experts: expected a divisor of the {world} ranks, got {experts}; choose one, so that every "
            "expert is held equally often"
        )


def _length(config: Config) -> Iterator[str]:
    train, tokens = config.train, config.tokens()
    if tokens > MOST_TOKENS and min(train.steps, train.batch_size, train.sequence_length) > 0:
        yield (
            f"train.steps: expected at most 2**53 tokens in all, steps * batch_size * sequence_length, got {tokens}; "
            "lower one of the three"
        )


def _schedule(config: Config) -> Iterator[str]:
    """Shares and tokens of the same thing exclude each other, and all of it fits into the run."""
    c = config.schedule
    if c.warmup is not None and c.warmup_tokens:
        yield (
            f"schedule.warmup: expected no share beside warmup_tokens = {c.warmup_tokens}, got {shown(c.warmup)}; "
            "remove one of the two"
        )
    lengths = {"hold_tokens": c.hold_tokens, "decay_tokens": c.decay_tokens}
    if c.decay is None:
        for key, value in lengths.items():
            if value is None:
                yield (
                    f"schedule.{key}: expected a value, got nothing; add it, or write schedule.decay as a share of the "
                    "run in the place of hold_tokens and decay_tokens"
                )
    elif given := " and ".join(key for key, value in lengths.items() if value is not None):
        yield f"schedule.decay: expected no share beside {given}, got {shown(c.decay)}; remove one of the forms"
    elif 0 <= c.decay <= 1 and 0 <= (c.warmup or 0) <= 1 and (config.schedule_in_tokens().hold_tokens or 0) < 0:
        warmup = f"{c.warmup_tokens} tokens" if c.warmup is None else shown(c.warmup)
        yield (
            f"schedule.decay: expected what a warm-up of {warmup} leaves of the run's {config.tokens()} tokens, got "
            f"{shown(c.decay)}; lower one of the two"
        )
    if c.decay is None and c.hold_tokens == c.decay_tokens == 0 and not c.floor:
        yield (
            "schedule.floor: expected above 0 when hold_tokens and decay_tokens are 0, got 0.0; the learning rate "
            "would be 0 after the warm-up, raise one of the three"
        )


def kernel_sizes(c: Model, *, device: str, compute: str) -> Iterator[str]:
    """Which sizes the kernels of a device do not take, in the form of `validate`."""
    step = 16 // ITEM_BYTES[compute]
    sizes = {"model.hidden_size": c.hidden_size, "model.moe.intermediate_size": c.moe.intermediate_size}
    for key, size in sizes.items():
        if size % step:
            yield (
                f"{key}: expected a multiple of {step} in {compute}, because grouped GEMMs and exchange move 16 bytes "
                f"at once, got {size}; write {-(-size // step) * step}"
            )
    if device == "cuda":
        for where, part in c.attentions().items():
            if isinstance(part, Rules):  # a script's own kind runs as plain torch
                yield from part.kernel_problems(where, step)


def _run(config: Config, world: int) -> Iterator[str]:
    c, train, source, name = config.model, config.train, config.data.source, config.run.name
    if not train.resume.strip():
        yield f'train.resume: expected "auto", "never" or a path, got {shown(train.resume)}; write one of them'
    if train.warm_start is not None and not train.warm_start.strip():
        yield f"train.warm_start: expected a path, got {shown(train.warm_start)}; write it or remove the key"
    if train.sequence_length > c.max_positions:
        yield (
            f"train.sequence_length: expected at most model.max_positions = {c.max_positions}, got "
            f"{train.sequence_length}; shorten the sequences or raise max_positions"
        )
    if 0 < train.sequence_length <= c.depth():
        yield (
            f"model.mtp.depth: expected below train.sequence_length = {train.sequence_length}, got {c.depth()}; lower "
            "it, no position has a token so far ahead"
        )
    if not divides(world * train.microbatch_size, train.batch_size):
        nearest = " and ".join(f"train.{key} = {size}" for key, size in fitting(train, world).items())
        yield (
            f"train.batch_size: expected a multiple of ranks * microbatch_size = {world} * {train.microbatch_size}, "
            f"got {train.batch_size}; write {nearest}, or pass --fit to `nmoe run` and `nmoe plan`"
        )
    if train.graph and config.run.device != "cuda":
        yield (
            f'train.graph: expected false when run.device is "{config.run.device}", got true; only a GPU replays graphs'
        )
    if train.graph and _plain(config):
        yield 'train.graph: expected false when run.kernels is "torch", got true; only the kernels can be recorded'
    for where, part in c.attentions().items():
        if train.graph and part.has_stages():
            yield (
                f"train.graph: expected false when {where}.index_warmup_tokens is above 0, got true; a recorded step "
                "cannot change its stage, write false"
            )
    if isinstance(source, Stdlib) and source.tokenizer_size > c.vocab_size:
        yield (
            f"data.source.tokenizer_size: expected at most model.vocab_size = {c.vocab_size}, got "
            f"{source.tokenizer_size}; raise vocab_size or lower tokenizer_size"
        )
    if name is not None and not is_run_name(name):
        yield f"run.name: expected {RULE}, got {shown(name)}; rename it"
