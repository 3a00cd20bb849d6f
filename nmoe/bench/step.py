"""`nmoe bench step`: how long an optimizer step takes, beside the same model in `transformers` if asked."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import Config
from nmoe.effects import files
from nmoe.effects.device import gpu, process
from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.terminal import say
from nmoe.effects.train.build import fresh
from nmoe.effects.train.step import learning_rates, make_step, tokens_per_step
from nmoe.errors import InputError, pip_install
from nmoe.pure.core.key import Key
from nmoe.pure.cost.plan import plan
from nmoe.pure.model import hf
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch
from nmoe.pure.units import quantity

OTHERS = ("transformers",)

WARMUP = 3
"""Steps before the clock starts: kernels load, allocators fill."""

ROUNDS = 3
"""Rounds, in each of which the trainers take turns: a machine that is slower for a while is so for both."""


@attrs.frozen(kw_only=True)
class Timing:
    """What was measured of one trainer."""

    seconds: tuple[float, ...]  # of each step
    loss: float  # of the first step, nats a target
    memory_bytes: int  # most held: of the GPU, or what the process grew by


def step(config: Config, against: str | None, steps: int, jsonl: Path | None = None) -> int:
    """Time `steps` optimizer steps of `config` on one batch of random tokens, in each of some rounds.

    Data, log and validation are left out. With `against`, the same weights take the same steps there: its own
    attention and experts, `torch.optim.AdamW`, the same clip, and so AdamW here whatever the config says. Each trainer
    has a process of its own in each round.

    against  "transformers" or None
    jsonl    also write one line a trainer there
    returns  exit code 0
    Raises:  InputError when the device or `transformers` is not there, or `jsonl` cannot be written.
    """
    if steps < 1:
        raise InputError(f"--steps: expected at least 1, got {steps}; 20 is a good start")
    if against is not None and against not in OTHERS:
        raise InputError(f"--against: expected one of {', '.join(OTHERS)}, got {against!r}; name one, or leave it out")
    device = gpu.device(config.run.device, kernels=config.run.kernels)
    peak_flops = gpu.peak_flops(device, files.home(os.environ))
    if jsonl is not None:
        files.new_file(jsonl, "--jsonl")
    names = ("nmoe",) if against is None else (against, "nmoe")
    if against is not None and "muon" in (config.optim.dense.optimizer, config.optim.expert.optimizer):
        config = by_adamw(config)
        say(f"{'optimizer':<14} AdamW on both sides, which {against} has; the config says Muon")
    rounds: dict[str, list[Timing]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            rounds[name].append(in_fresh_process(config, name, steps))
    timings = {name: merged(rounds[name]) for name in reversed(names)}
    flops = plan(config, make_blueprint(config), mfu=1.0, peak_flops=peak_flops).flops.training()
    tokens = config.train.batch_size * config.train.sequence_length
    for name, timing in timings.items():
        say(line(name, timing, tokens, flops, peak_flops))
        if jsonl is not None:
            numbers = {"variant": name, "device": str(device), "tokens": tokens, "flops_per_token": flops}
            with jsonl.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**numbers, "peak_flops": peak_flops, **attrs.asdict(timing)}) + "\n")
    if against is not None:
        ours, theirs = timings["nmoe"], timings[against]
        faster = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
        # a model smaller than what the imports needed leaves no mark in the peak
        known = ours.memory_bytes > 0 and theirs.memory_bytes > 0
        memory = f", {theirs.memory_bytes / ours.memory_bytes:.2f} in memory" if known else ""
        say(f"{'ratio':<14} {faster:.2f} in time{memory}  ({against} / nmoe)")
    return 0


def by_adamw(config: Config) -> Config:
    """A config with AdamW in every group."""
    groups = {name: getattr(config.optim, name) for name in ("dense", "expert")}
    adamw = {name: attrs.evolve(group, optimizer="adamw") for name, group in groups.items()}
    return attrs.evolve(config, optim=attrs.evolve(config.optim, **adamw))


def in_fresh_process(config: Config, name: str, steps: int) -> Timing:
    """`timed` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(timed, config, name, steps).result()


def timed(config: Config, name: str, steps: int) -> Timing:
    """Build one trainer and time its steps."""
    device = gpu.device(config.run.device, kernels=config.run.kernels)
    rt = process.Runtime(device=device, rank=0, world=1, peak_flops=1.0)
    batch = random_batch(config, device)
    if name == "nmoe":
        held = gpu.memory_bytes(device)
        one = our_step(config, rt, batch)
    else:
        build = their_classes()
        held = gpu.memory_bytes(device)
        one = their_step(config, their_network(config, rt, build), batch)
    timing = measure(one, steps, device)
    return attrs.evolve(timing, memory_bytes=gpu.memory_bytes(device) - held)


def merged(rounds: Sequence[Timing]) -> Timing:
    """Merge the rounds of a trainer."""
    return Timing(
        seconds=tuple(seconds for timing in rounds for seconds in timing.seconds),
        loss=rounds[0].loss,
        memory_bytes=max(timing.memory_bytes for timing in rounds),
    )


def random_batch(config: Config, device: torch.device) -> Batch:
    """One step's batch [M B T]."""
    train = config.train
    shape = (train.batch_size // train.microbatch_size, train.microbatch_size, train.sequence_length + 1)
    generator = Key(config.run.seed).fold("bench").generator()
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), ())


def measure(one: Callable[[], Tensor], steps: int, device: torch.device) -> Timing:
    """Call `one` for warm-up, then time `steps` calls; waits for the device at the end only."""
    losses = [one() for _ in range(WARMUP)]
    clock = gpu.Clock(device)
    clock.mark("start")
    for index in range(steps):
        one()
        clock.mark(str(index))
    return Timing(seconds=tuple(clock.split().values()), loss=losses[0].item(), memory_bytes=0)


def line(name: str, timing: Timing, tokens: int, flops: int, peak_flops: float) -> str:
    """One trainer's figures; the median of the steps' times, and their range."""
    seconds = statistics.median(timing.seconds)
    low, high = min(timing.seconds), max(timing.seconds)
    rate = tokens / seconds
    return (
        f"{name:<14} {1000 * seconds:.1f} ms a step ({1000 * low:.1f} to {1000 * high:.1f})"
        f"  {quantity(rate)} tok/s  mfu {100 * rate * flops / peak_flops:.1f} %"
        f"  memory {quantity(timing.memory_bytes, 'B')}  first loss {timing.loss:.6f}"
    )


def our_step(config: Config, rt: process.Runtime, batch: Batch) -> Callable[[], Tensor]:
    """A call takes one step and returns its loss."""
    blueprint = make_blueprint(config)
    accumulator = Accumulator()
    state, env = fresh(config, blueprint, rt, accumulator=accumulator)
    take = make_step(config, blueprint, env, rt, mark=lambda name: None, accumulator=accumulator)

    def one() -> Tensor:
        nonlocal state
        state, metrics = take(state, batch)
        return metrics.loss

    return one


def their_classes() -> tuple[Any, Any]:
    """`transformers`' config and model classes."""
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError as error:
        raise InputError(
            f'--against: expected the extra `hf` for "transformers", got {error}; install it with: {pip_install("hf")}'
        ) from error
    return DeepseekV3Config, DeepseekV3ForCausalLM


def their_network(config: Config, rt: process.Runtime, classes: tuple[Any, Any]) -> Any:
    """`transformers`' model with the weights a run of `config` starts from, in the format of `precision.compute`."""
    settings_class, model_class = classes
    if (name := hf.family_of(config.model)[0]) != "deepseek_v3":
        raise InputError(f"--against: expected a config whose model is a deepseek_v3, got a {name}; choose another")
    dtype = torch.float32 if config.precision.compute == "fp32" else torch.bfloat16
    state, _ = fresh(config, make_blueprint(config), rt)
    with rt.device:
        network = model_class(settings_class(**hf.settings(config.model), use_cache=False))
    network.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    network.load_state_dict(hf.state_dict(state.params, state.router_bias, config.model), strict=True)
    return network.train()


def their_step(config: Config, network: Any, batch: Batch) -> Callable[[], Tensor]:
    """A call takes one step and returns its loss.

    Parameters and moments have the format of the parameters: in bf16 less is stored, and less is read, than by a
    trainer that keeps an fp32 master. Decay is for everything, and the router bias does not move.
    """
    rates = learning_rates(config, tokens_per_step(config))
    group = config.optim.dense
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=rates["dense"],
        betas=(group.beta1, group.beta2),
        eps=group.eps,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    num_targets = batch.targets.numel()

    def one() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=batch.tokens.device)
        for tokens, targets in zip(batch.tokens.unbind(0), batch.targets.unbind(0), strict=True):
            logits = network(tokens).logits.flatten(0, 1).float()
            loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") / num_targets
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optim.clip_norm)
        optimizer.step()
        return total

    return one
