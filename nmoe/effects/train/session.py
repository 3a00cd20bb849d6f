"""What a training is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from nmoe.config import Config
from nmoe.effects.data.corpus import Corpus
from nmoe.effects.data.store.blocks import Verification
from nmoe.effects.device import gpu, process, signals
from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.parallel.exchange import Exchange
from nmoe.effects.parallel.launch import Launch, RankHeartbeat
from nmoe.effects.record.log import Log
from nmoe.effects.train import resume, rewind
from nmoe.effects.train.identity import Identity
from nmoe.effects.train.report import Report
from nmoe.effects.train.save import Saver
from nmoe.effects.train.step import Metrics, State
from nmoe.effects.train.world import Judge
from nmoe.errors import InputError
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.cost.plan import Plan
from nmoe.pure.model.model import Batch
from nmoe.pure.model.ops import Env


@attrs.frozen(kw_only=True)
class Connected:
    """One rank that reaches the others."""

    launch: Launch
    runtime: process.Runtime
    heartbeat: RankHeartbeat


@attrs.frozen(kw_only=True)
class Job:
    """What is trained, on which data, in which folder, and what it will take."""

    folder: Path
    origin: resume.Origin | None  # checkpoints to resume from
    rewinds: tuple[rewind.Rewind, ...]
    corpus: Corpus
    identity: Identity
    blueprint: Blueprint
    plan: Plan


@attrs.frozen(kw_only=True)
class Start:
    """Where this attempt begins."""

    state: State
    env: Env
    exchange: Exchange | None
    accumulator: Accumulator
    clock: gpu.Clock
    restored: resume.Restored | None


@attrs.frozen(kw_only=True)
class Session:
    """Everything a training uses between its first step and its last."""

    config: Config
    blueprint: Blueprint
    runtime: process.Runtime
    corpus: Corpus
    env: Env
    exchange: Exchange | None
    log: Log
    step: Callable[[State, Batch], tuple[State, Metrics]]
    read: Callable[[int], Batch]
    refusal: Callable[[int], InputError | None]  # why `read` of a cursor would raise
    verification: Verification  # of the shards that this rank owns
    report: Report
    saver: Saver
    judge: Judge | None  # None: nobody is asked
    clock: gpu.Clock
    stop: signals.Stop
    heartbeat: RankHeartbeat
