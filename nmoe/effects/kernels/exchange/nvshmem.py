"""Puts by NVSHMEM: rows and words into the memory of ranks that stores do not reach, and a barrier among all.

Counterparts of `push`, for the ranks that have no address in the table that `push` takes. A message is a run: items
that are neighbours where they are sent from and where they go. Between hosts a rank sends from NVSHMEM's memory alone,
so items are first copied there, in an order of long runs.

W ranks · D hidden size · K choices of a token · P places, in the order of sending · M of these that there is room for
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import core
from triton.language.extra.cuda import globaltimer

from nmoe.effects.kernels.exchange.push import block_of
from nmoe.pure.parallel.exchange_arena import FLAG_BYTES

SET = 9
"""NVSHMEM_SIGNAL_SET: every thread of the block sends the signal, so it must replace the word. Any other value adds to
it: with 0, two H200 passed barriers that nobody had reached (docs/log.md, 2026-11-29)."""

AT_LEAST = 5
"""NVSHMEM_CMP_GE."""

BLOCK = 256
"""Most items of a message."""

WARPS = 16
"""Of a program that puts: within a host its threads copy the bytes. With 4, and eight programs, 10 GB/s moved where
plain stores moved 65 to 200 (docs/log.md, 2026-11-29)."""

ROWS = 4
"""Rows a program copies at once to where they are sent from."""


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


@core.extern
def _compared(flag, how, value, _semantic=None):
    """Whether a word of this rank compares with a value; if so, what was put before it was written is there."""
    types = (core.dtype("int64"), core.dtype("int32"), core.dtype("int64"))
    function = {types: ("nvshmem_int64_test", core.dtype("int32"))}
    return core.extern_elementwise("", "", [flag, how, value], function, is_pure=False, _semantic=_semantic)


@triton.jit
def stage_kernel(
    x, stage, item, to, addresses, valid, D, K, W, M, PROGRAMS, VALID: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.minimum(tl.load(valid + VALID), M)
    for begin in range(tl.program_id(0) * ROWS, count, PROGRAMS * ROWS):
        number = begin + tl.arange(0, ROWS)
        real = number < count
        place = tl.load(item + number, mask=real, other=0)
        peer = tl.load(to + place, mask=real, other=W)
        sent = tl.load(addresses + peer, mask=peer < W, other=1) == 0
        row = (place // K).to(tl.int64)
        for first in range(0, D, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = sent[:, None] & (column < D)[None, :]
            value = tl.load(x + row[:, None] * D + column[None, :], mask=inside)
            tl.store(stage + number.to(tl.int64)[:, None] * D + column[None, :], value, mask=inside)


# Not specialised: one kernel for all puts and one for all barriers, for linking with NVSHMEM takes tens of seconds.
@triton.jit(do_not_specialize=["source", "target", "BYTES", "W", "M", "SHARE", "PROGRAMS", "VALID"])
def nvshmem_put_kernel(
    source, target, item, to, at, addresses, valid, pes, BYTES, W, M, SHARE, PROGRAMS, VALID, BLOCK: tl.constexpr
):
    # where some rank would have to hold too much, `valid` is zero
    count = tl.minimum(tl.load(valid + VALID), M)
    lane = tl.arange(0, BLOCK)
    begin = tl.program_id(0) * SHARE
    while begin < count:
        size = tl.minimum(SHARE, count - begin)
        real = lane < size
        follows = real & (lane > 0)
        place = tl.load(item + begin + lane, mask=real, other=0)
        before = tl.load(item + begin + lane - 1, mask=follows, other=0)
        moved = tl.load(to + place, mask=real, other=W) != tl.load(to + before, mask=follows, other=W)
        there = tl.load(at + place, mask=real, other=0)
        head = real & (moved | (there != tl.load(at + before, mask=follows, other=0) + 1))
        first = size * 0
        while first < size:
            end = tl.min(tl.where(head & (lane > first), lane, size))
            here = tl.load(item + begin + first)
            peer = tl.load(to + here)
            if tl.load(addresses + peer, mask=peer < W, other=1) == 0:
                field = target + tl.load(at + here).to(tl.int64) * BYTES
                length = (end - first).to(tl.int64) * BYTES
                _put_(field, source + (begin + first).to(tl.int64) * BYTES, length, tl.load(pes + peer))
            first = end
        begin += PROGRAMS * SHARE


@triton.jit
def _come(flag, now, is_stored, AT_LEAST: tl.constexpr):
    """Whether a flag has reached a number: as `push.await_flags` reads one that a store wrote, or by NVSHMEM."""
    if is_stored:
        # acquire at system scope, of the release with which the peer's store came
        word = flag.to(tl.pointer_type(tl.int64))
        come = (tl.atomic_add(word, 0, sem="acquire", scope="sys") >= now).to(tl.int32)
    else:
        come = _compared(flag, AT_LEAST, now)
    return come


@triton.jit(do_not_specialize=["arrived", "OFFSET", "ME", "W", "LIMIT"])
def nvshmem_barrier_kernel(
    epoch, addresses, arrived, missing, pes, OFFSET, ME, W, LIMIT, FLAG: tl.constexpr, SET: tl.constexpr,
    AT_LEAST: tl.constexpr, SIGNAL: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    now = tl.load(epoch)
    if SIGNAL:
        now += 1
        _quiet()
        tl.debug_barrier()  # every thread has read the epoch before one writes it
        tl.store(epoch, now)
        for rank in range(W):
            address = tl.load(addresses + rank)
            if address != 0:
                # release, system scope: rows and words that earlier kernels of the stream stored are visible before it;
                # puts to other ranks are not of its concern, and have arrived
                flag = (address + OFFSET).to(tl.pointer_type(tl.int64)) + ME * (FLAG // 8)
                tl.atomic_xchg(flag, now, sem="release", scope="sys")
            else:
                _signal_(arrived + ME.to(tl.int64) * FLAG, now, SET, tl.load(pes + rank))
    if WAIT:
        begin = now
        if LIMIT > 0:
            begin = globaltimer()
        for rank in range(W):
            is_stored = tl.load(addresses + rank) != 0
            come = _come(arrived + rank * FLAG, now, is_stored, AT_LEAST)
            while come == 0:
                if LIMIT > 0:
                    if globaltimer() - begin > LIMIT:  # pyright: ignore[reportOperatorIssue]
                        tl.store(missing, rank + 1)
                        tl.inline_asm_elementwise(
                            "membar.sys; trap; mov.u32 $0, 0;", "=r,r", [rank], dtype=tl.int32, is_pure=False, pack=1
                        )
                come = _come(arrived + rank * FLAG, now, is_stored, AT_LEAST)


def stage_(
    stage: Tensor, x: Tensor, item: Tensor, to: Tensor, addresses: Tensor, valid: Tensor, programs: int, *, back: bool
) -> None:
    """Copy rows that are put to where they are sent from, one for each place, in the order of sending.

    stage     [M D]   for all places but those that are nowhere, which come last; rows that stores carry stay unwritten
    x         [N D]
    item      [P] i32     place, counted through; may be longer
    to        [N K] i32   rank of each place; no rank of the exchange: nowhere
    addresses [W] i64     of the arenas that stores reach; 0: rows are put there
    valid     [3] i32     `plan.Plan.valid`
    programs  that share the rows out
    back      whether these are rows that go back, of which the third of `valid` counts, or tokens

    Writes:  stage.
    """
    k = 1 if back else to.shape[1]
    d = x.shape[1]
    most = min(stage.shape[0], to.numel())
    if not most:
        return
    grid = min(programs, triton.cdiv(most, ROWS))
    stage_kernel[(grid,)](
        x, stage, item, to, addresses, valid, d, k, addresses.shape[0], most, grid, 2 if back else 0, ROWS,
        block_of(d), num_warps=8,
    )  # fmt: skip


def put_(
    stage: Tensor,
    target: int,
    item: Tensor,
    to: Tensor,
    at: Tensor,
    addresses: Tensor,
    valid: Tensor,
    pes: Tensor,
    library: str,
    programs: int,
    *,
    back: bool,
) -> None:
    """Put items that are staged, in the order of sending, into a field of the arenas that stores do not reach.

    stage     [M ...]     rows or words, in NVSHMEM's memory
    target    address of the field in this rank's own arena, which stands for the same place in every arena
    item      [P] i32     place, counted through; may be longer
    to        rank of each place, i32; no rank of the exchange: nowhere
    at        its place in the field, i32
    addresses [W] i64     of the arenas that stores reach; 0: items are put there
    valid     [3] i32     `plan.Plan.valid`
    pes       [W] i32     what NVSHMEM calls each rank
    library   path of its device functions, which the launch links with
    programs  that share the items out
    back      whether they go back, so that the third of `valid` counts

    Writes:  that field.
    """
    most = min(stage.shape[0], to.numel())
    if not most:
        return
    share = min(BLOCK, triton.cdiv(most, programs))
    grid = min(programs, triton.cdiv(most, share))
    size = stage[0].numel() * stage.element_size()
    nvshmem_put_kernel[(grid,)](
        stage.data_ptr(), target, item, to, at, addresses, valid, pes, size, pes.shape[0], most, share, grid,
        2 if back else 0, BLOCK, num_warps=WARPS, extern_libs={"nvshmem": library},
    )  # fmt: skip


def barrier_(
    epoch: Tensor,
    addresses: Tensor,
    arrived: Tensor,
    missing: Tensor,
    pes: Tensor,
    offset: int,
    rank: int,
    library: str,
    *,
    signal: bool,
    wait: bool,
    limit_ns: int,
) -> None:
    """`push.barrier_` with NVSHMEM: signal every rank that all puts and stores of this one have arrived, wait for all.

    epoch    [1] i64     barriers this rank has entered
    addresses  [W] i64   of the arenas that stores reach; 0: NVSHMEM signals there
    arrived  [W FLAG] i64   this rank's flags, at the same place in every arena
    missing  [1] i32     on the host: gets the number of a rank that did not come, and one, before the device traps
    pes      [W] i32     what NVSHMEM calls each rank
    offset   bytes from an arena's beginning to its flags
    library  path of its device functions
    limit_ns how long one is waited for; 0: for ever, which the interpreter needs

    Writes:  epoch and this rank's flag in every arena, or `missing`.
    """
    nvshmem_barrier_kernel[(1,)](
        epoch, addresses, arrived.data_ptr(), missing, pes, offset, rank, pes.shape[0], limit_ns, FLAG_BYTES, SET,
        AT_LEAST, signal, wait, num_warps=1, extern_libs={"nvshmem": library},
    )  # fmt: skip
