"""What a training meets outside itself, so that a test or `nmoe soak` can give it a worse one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from nmoe.effects.checkpoint.fs import Disk, Fs
from nmoe.effects.data.tokenizer import Tokenizer
from nmoe.effects.device.process import Runtime
from nmoe.effects.train.generate import Network
from nmoe.pure.evals.score import Score
from nmoe.pure.model.model import Batch
from nmoe.pure.model.ops import Env

Judge = Callable[[Network, Tokenizer, Callable[[], None]], Mapping[str, Score]]
"""Scores of a model by task. The last argument is called between forward passes, as often on every rank, and what it
raises ends the evaluation."""


def unchanged(thing: Any) -> Any:
    """The argument itself."""
    return thing


def nothing(runtime: Runtime) -> None:
    """Do nothing."""


@attrs.frozen(kw_only=True)
class World:
    """The disk, the reader of batches and the ops of a training; who judges the model at the cadence of `eval`, and
    what precedes and follows the training while the ranks are joined.
    """

    fs: Fs = attrs.Factory(Disk)
    read: Callable[[Callable[[int], Batch]], Callable[[int], Batch]] = unchanged
    env: Callable[[Env], Env] = unchanged
    begun: Callable[[Runtime], None] = nothing
    ended: Callable[[Runtime], None] = nothing
    judge: Judge | None = None
