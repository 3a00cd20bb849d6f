"""What a training meets outside itself, so that a test or `nmoe soak` can give it a worse one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from nmoe.effects.checkpoint.fs import Disk, Fs
from nmoe.effects.device.process import Runtime
from nmoe.pure.model.model import Batch
from nmoe.pure.model.ops import Env


def unchanged(thing: Any) -> Any:
    """The argument itself."""
    return thing


def nothing(runtime: Runtime) -> None:
    """Do nothing."""


@attrs.frozen(kw_only=True)
class World:
    """The disk, the reader of batches and the ops of a training; what follows it while the ranks are joined."""

    fs: Fs = attrs.Factory(Disk)
    read: Callable[[Callable[[int], Batch]], Callable[[int], Batch]] = unchanged
    env: Callable[[Env], Env] = unchanged
    ended: Callable[[Runtime], None] = nothing
