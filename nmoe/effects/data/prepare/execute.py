"""Who runs the tasks: this process, processes of its own, or a Dask cluster. What comes out is the same."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import attrs

from nmoe.effects.data.prepare.inputs import extra, one_line
from nmoe.errors import InputError

W = TypeVar("W")
R = TypeVar("R")

MOST_PROBLEMS = 20
"""Problems after which a stage stops early; until then one bad file does not hold up the others."""


@attrs.frozen(kw_only=True)
class Pool:
    """An executor, None for this process itself, and how many tasks it is given at once."""

    executor: Executor | None
    in_flight: int


@contextmanager
def open_pool(*, workers: int, dask: str | None) -> Iterator[Pool]:
    """The processes that run tasks.

    workers  processes of this machine; 1 is this process
    dask     address of a scheduler, whose workers see the same files and have nmoe; None: no Dask

    Raises:  InputError when Dask is not installed, not there, or gives up on a task.
    """
    if dask is not None:
        yield from _dask(dask)
    elif workers == 1:
        yield Pool(executor=None, in_flight=1)
    else:
        spawn = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_live_with_parent)
        try:
            yield Pool(executor=executor, in_flight=2 * workers)
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process: expected its end when its work is done, got a sudden one, most often for lack of "
                "memory; "
                "start again with fewer --workers or a smaller task_bytes, what is done is kept"
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def run(function: Callable[[W], R], works: Iterable[W], pool: Pool) -> Iterator[tuple[W, R]]:
    """Call `function` on every work, and yield each with its result as it ends, in any order.

    The next work is taken when one has ended, so that an executor never holds a long queue.

    Raises:  InputError with the problems of all works, once the others are through.
    """
    problems: list[str] = []
    if pool.executor is None:
        for work in works:
            try:
                yield work, function(work)
            except InputError as error:
                problems += error.problems
                if len(problems) >= MOST_PROBLEMS:
                    break
    else:
        waiting = iter(works)
        flying: dict[Future[R], W] = {}
        while True:
            while len(flying) < pool.in_flight and (work := next(waiting, None)) is not None:
                flying[pool.executor.submit(function, work)] = work
            if not flying:
                break
            ended, _ = concurrent.futures.wait(flying, return_when=FIRST_COMPLETED)
            for future in ended:
                work = flying.pop(future)
                try:
                    yield work, future.result()
                except InputError as error:
                    problems += error.problems
            if len(problems) >= MOST_PROBLEMS:
                break
    if problems:
        raise InputError(*problems)


def _dask(address: str) -> Iterator[Pool]:
    """The pool of a Dask cluster."""
    try:
        import distributed
    except ImportError as error:
        raise extra("distributed", "--dask", "cluster") from error
    try:
        with distributed.Client(address, timeout=20, set_as_default=False) as client:
            threads = sum(worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())
            if not threads:
                raise InputError(f"--dask {address}: expected a scheduler with workers, got none; start workers")
            yield Pool(executor=client.get_executor(pure=False), in_flight=2 * threads)
    except (OSError, TimeoutError, distributed.KilledWorker, concurrent.futures.CancelledError) as error:
        raise InputError(
            f"--dask {address}: expected a cluster that stays, got {one_line(error)}; start again, what is done is kept"
        ) from error


def _live_with_parent() -> None:
    """Set a worker process up: it leaves Ctrl-C to its parent, and ends when the parent has, however that ended.

    A killed parent closes no queue, and the worker would wait for it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("a worker process without a parent")

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
