"""Batches read ahead by a thread, and their way to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.model.model import Batch

Read = Callable[[int], Batch]


class Ahead:
    """Batches by cursor, the next of which are made beforehand. Every call is of one thread."""

    def __init__(
        self, submit: Callable[[int], Future[Batch]], place: Callable[[Batch], Batch], *, batch_size: int, depth: int
    ) -> None:
        """submit: begins to make the batch of a cursor; place: moves it to the device; the rest as `prefetching`."""
        self._submit, self._place, self._batch_size, self._depth = submit, place, batch_size, depth
        self._pending: deque[tuple[int, Future[Batch]]] = deque()

    def __call__(self, cursor: int) -> Batch:
        """The batch of a cursor, on the device."""
        batch = self._next(cursor).result()
        self._pending.popleft()
        return self._place(batch)

    def refusal(self, cursor: int) -> InputError | None:
        """Why the batch of a cursor can not be had, if the data is to blame; waits for it, the call for it does not."""
        error = self._next(cursor).exception()
        return error if isinstance(error, InputError) else None

    def _next(self, cursor: int) -> Future[Batch]:
        """The batch of a cursor as it is being made, with the next ones begun."""
        if self._pending and self._pending[0][0] != cursor:
            while self._pending:
                self._pending.popleft()[1].cancel()
        for index in range(len(self._pending), self._depth + 1):
            at = cursor + index * self._batch_size
            self._pending.append((at, self._submit(at)))
        return self._pending[0][1]


@contextmanager
def prefetching(
    read: Read, *, batch_size: int, depth: int, device: torch.device, pinned: bool = True
) -> Iterator[Ahead]:
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

    def place(batch: Batch) -> Batch:
        return tree.map(lambda path, leaf: leaf.to(device, non_blocking=True), batch)

    if not depth:
        yield Ahead(lambda cursor: _made(fetch, cursor), place, batch_size=batch_size, depth=0)
        return
    with ThreadPoolExecutor(1, "prefetch") as executor:
        try:
            yield Ahead(lambda cursor: executor.submit(fetch, cursor), place, batch_size=batch_size, depth=depth)
        finally:
            executor.shutdown(cancel_futures=True)


def _made(fetch: Read, cursor: int) -> Future[Batch]:
    """A batch that was made at once, or why not."""
    future: Future[Batch] = Future()
    try:
        future.set_result(fetch(cursor))
    except InputError as error:
        future.set_exception(error)
    return future
