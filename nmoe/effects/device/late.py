"""Numbers of the device, read one step late, so that it never waits for the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def read_late(columns: Iterable[Tensor], device: torch.device) -> Iterator[list[int]]:
    """The numbers of each column [B] i64; on a GPU those of one are read after the next is begun."""
    if device.type != "cuda":
        yield from (column.tolist() for column in columns)
        return
    begun = deque[tuple[Tensor, torch.cuda.Event]]()
    for column in columns:
        begun.append(_copied(column))
        if len(begun) > 1:
            yield _read(*begun.popleft())
    yield from (_read(*copy) for copy in begun)


def _copied(column: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy in the host's memory, and the event after which it is there."""
    held = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
    held.copy_(column, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return held, event


def _read(held: Tensor, event: torch.cuda.Event) -> list[int]:
    event.synchronize()
    return held.tolist()
