"""Rows put into the memory of ranks on other hosts, by NVSHMEM: a run of rows is one message, never a row.

These kernels take what `kernels.exchange` takes, runs that are contiguous at both ends, and do what `push` and the
telling half of `meet_` do. They compile and link; they have run on no network, and no exchange opens with them: see
docs/exchange.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

LIBRARY = "libnvshmem_device.bc"
"""NVSHMEM's device functions, in the wheel nvidia-nvshmem-cu13, which launches link with."""

SET = 0
"""A signal replaces what was there: every thread of a block sends it, so it must not add."""


@core.extern
def _put(target, source, size, peer, _semantic=None):
    """The whole block copies; `quiet` says when it is done."""
    types = (core.dtype("int64"), core.dtype("int64"), core.dtype("int64"), core.dtype("int32"))
    function = {types: ("nvshmemx_putmem_nbi_block", core.dtype("int32"))}
    return core.extern_elementwise("", "", [target, source, size, peer], function, is_pure=False, _semantic=_semantic)


@core.extern
def _quiet(_semantic=None):
    """Every put of this rank has arrived."""
    function = {(): ("nvshmem_quiet", core.dtype("int32"))}
    return core.extern_elementwise("", "", [], function, is_pure=False, _semantic=_semantic)


@core.extern
def _signal(flag, value, how, peer, _semantic=None):
    """A word at a peer."""
    types = (core.dtype("int64"), core.dtype("int64"), core.dtype("int32"), core.dtype("int32"))
    function = {types: ("nvshmemx_signal_op", core.dtype("int32"))}
    return core.extern_elementwise("", "", [flag, value, how, peer], function, is_pure=False, _semantic=_semantic)


@triton.jit
def put_runs_kernel(source, target, end, shift, BYTES, LOCAL, R, HOME: tl.constexpr):
    run = tl.program_id(0)
    begin = tl.load(end + run - 1, mask=run > 0, other=0)
    rows = tl.load(end + run) - begin
    peer = run % R if HOME else run // LOCAL
    if rows > 0:
        there = target + (begin + tl.load(shift + run)).to(tl.int64) * BYTES
        _put(there, source + begin.to(tl.int64) * BYTES, rows.to(tl.int64) * BYTES, peer)


@triton.jit
def tell_kernel(epoch, flag, R: tl.constexpr, SET: tl.constexpr):
    now = tl.load(epoch) + 1
    _quiet()
    tl.debug_barrier()
    tl.store(epoch, now)
    for peer in range(R):
        _signal(flag, now, SET, peer)


def put_runs(
    source: int, target: int, end: Tensor, shift: Tensor, row_bytes: int, ranks: int, library: str, *, home: bool
) -> None:
    """Runs of rows into a field of other ranks' arenas, each in one message.

    source     address of the first row, in symmetric memory; rows of a run are neighbours
    target     address of the field in this rank's own arena, which stands for the same place in every arena
    end        [runs] i32   one past a run's last row: of each expert, or `Plan.home_end`
    shift      [runs] i32   row at the peer, less row here: `Plan.shift` or `Plan.home_shift`
    row_bytes  a multiple of 16
    library    path of `LIBRARY`
    home       whether rows go back to their sources

    Writes:  that field.
    """
    runs = end.shape[0]
    put_runs_kernel[(runs,)](
        source, target, end, shift, row_bytes, runs // ranks, ranks, home, extern_libs={"nvshmem": library}
    )


def tell_(epoch: Tensor, flag: int, ranks: int, library: str) -> None:
    """Say at every rank that all puts of this one have arrived.

    epoch    [1] i64   phases told so far
    flag     address of this rank's flag in its own arena
    library  path of `LIBRARY`

    Writes:  epoch, and this rank's flag in every arena.
    """
    tell_kernel[(1,)](epoch, flag, ranks, SET, num_warps=1, extern_libs={"nvshmem": library})
