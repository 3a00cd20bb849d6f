"""Put rows into the memory of ranks on other hosts, by NVSHMEM: messages of contiguous rows, not one a row.

Counterparts of `push_` and of the signal half of `barrier_`; right between two H200 of one host (docs/log.md,
2026-11-29), not run between hosts. No exchange opens with them: `parallel.transport` does not name NVSHMEM, and
docs/decisions/0011-between-hosts.md says why.

W ranks · E experts of all ranks
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

LIBRARY = "libnvshmem_device.bc"
"""NVSHMEM's device functions, in the wheel nvidia-nvshmem-cu13, which launches link with."""

SET = 9
"""NVSHMEM_SIGNAL_SET: every thread of the block sends the signal, so it must replace the word. Any other value adds to
it: with 0, two H200 passed barriers that nobody had reached (docs/log.md, 2026-11-29)."""


PARTS = 32
"""Programs that put one run: within a host their threads copy the bytes. One of 4 warps a run, eight in all, moved 10
GB/s where plain stores moved 65 to 200 (docs/log.md, 2026-11-29)."""

WARPS = 16
"""Of such a program."""


@core.extern
def _put_(target, source, size, peer, _semantic=None):
    """Copy by all threads of the block, not yet complete; `_quiet` completes it."""
    types = (core.dtype("int64"), core.dtype("int64"), core.dtype("int64"), core.dtype("int32"))
    function = {types: ("nvshmemx_putmem_nbi_block", core.dtype("int32"))}
    return core.extern_elementwise("", "", [target, source, size, peer], function, is_pure=False, _semantic=_semantic)


@core.extern
def _quiet(_semantic=None):
    """Wait until every put of this rank has arrived."""
    function = {(): ("nvshmem_quiet", core.dtype("int32"))}
    return core.extern_elementwise("", "", [], function, is_pure=False, _semantic=_semantic)


@core.extern
def _signal_(flag, value, how, peer, _semantic=None):
    """Write a signal word at a peer."""
    types = (core.dtype("int64"), core.dtype("int64"), core.dtype("int32"), core.dtype("int32"))
    function = {types: ("nvshmemx_signal_op", core.dtype("int32"))}
    return core.extern_elementwise("", "", [flag, value, how, peer], function, is_pure=False, _semantic=_semantic)


@triton.jit
def put_runs_kernel(source, target, end, shift, BYTES, LOCAL, W, BACK: tl.constexpr):
    run = tl.program_id(0)
    first = tl.load(end + run - 1, mask=run > 0, other=0)
    share = tl.cdiv(tl.load(end + run) - first, tl.num_programs(1))
    begin = first + tl.program_id(1) * share
    rows = tl.minimum(tl.load(end + run) - begin, share)
    peer = run % W if BACK else run // LOCAL
    if rows > 0:
        there = target + (begin + tl.load(shift + run)).to(tl.int64) * BYTES
        _put_(there, source + begin.to(tl.int64) * BYTES, rows.to(tl.int64) * BYTES, peer)


@triton.jit
def signal_kernel(epoch, flag, W: tl.constexpr, SET: tl.constexpr):
    now = tl.load(epoch) + 1
    _quiet()
    tl.debug_barrier()
    tl.store(epoch, now)
    for peer in range(W):
        _signal_(flag, now, SET, peer)


def put_runs_(
    source: int, target: int, end: Tensor, shift: Tensor, row_bytes: int, ranks: int, library: str, *, back: bool
) -> None:
    """Runs of rows into a field of other ranks' arenas, each in at most `PARTS` messages.

    source     address of the first row, in symmetric memory; rows of a run are neighbours
    target     address of the field in this rank's own arena, which stands for the same place in every arena
    end        [runs] i32   one past a run's last row: of each expert, or `Plan.origin_end`
    shift      [runs] i32   row at the peer, less row here: `Plan.shift` or `Plan.origin_shift`
    row_bytes  a multiple of 16
    library    path of `LIBRARY`
    back       whether rows go back to their sources

    Writes:  that field.
    """
    runs = end.shape[0]
    put_runs_kernel[(runs, PARTS)](
        source, target, end, shift, row_bytes, runs // ranks, ranks, back, num_warps=WARPS,
        extern_libs={"nvshmem": library},
    )  # fmt: skip


def signal_(epoch: Tensor, flag: int, ranks: int, library: str) -> None:
    """Signal every rank that all puts of this one have arrived.

    epoch    [1] i64   barriers this rank has entered
    flag     address of this rank's flag in its own arena
    library  path of `LIBRARY`

    Writes:  epoch, and this rank's flag in every arena.
    """
    signal_kernel[(1,)](epoch, flag, ranks, SET, num_warps=1, extern_libs={"nvshmem": library})
