"""Batches read ahead by a thread, and their way to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from nmoe.pure.core import tree
from nmoe.pure.model.model import Batch

Read = Callable[[int], Batch]


@contextmanager
def prefetching(
    read: Read, *, batch_size: int, depth: int, device: torch.device, pinned: bool = True
) -> Iterator[Read]:
    """`read` with the next `depth` batches made beforehand, and moved to the device.

    What comes back depends on the cursor alone: a call with another cursor than the expected one throws away what was
    read ahead. What goes wrong in the thread is raised by the call that would have got the batch. For a GPU the thread
    puts batches into pinned memory, and the copy to the device does not make the host wait.

    batch_size  how far the cursor moves from call to call
    depth       batches; 0: none, everything happens in the call
    pinned      False: a GPU's batches stay in pageable memory, and the host waits for their copy
    """
    pinned = pinned and device.type == "cuda"

    def fetch(cursor: int) -> Batch:
        batch = read(cursor)
        return tree.map(lambda path, leaf: leaf.pin_memory(), batch) if pinned else batch

    def placed(batch: Batch) -> Batch:
        return tree.map(lambda path, leaf: leaf.to(device, non_blocking=True), batch)

    if not depth:
        yield lambda cursor: placed(fetch(cursor))
        return
    pending: deque[tuple[int, Future[Batch]]] = deque()
    with ThreadPoolExecutor(1, "prefetch") as executor:

        def ahead(cursor: int) -> Batch:
            if pending and pending[0][0] != cursor:
                while pending:
                    pending.popleft()[1].cancel()
            for index in range(len(pending), depth + 1):
                at = cursor + index * batch_size
                pending.append((at, executor.submit(fetch, at)))
            return placed(pending.popleft()[1].result())

        try:
            yield ahead
        finally:
            executor.shutdown(cancel_futures=True)
