"""Reduce-scatter and all-gather among GPUs of one host by copy engines, beside kernels that keep all multiprocessors.

NCCL's kernels take multiprocessors and bandwidth from the GEMMs beside them. Here each rank copies the gradients that
another sums into a slot of that one's memory, and a slot is written again when all have freed it. Updated parameters it
copies to where the others read them, in memory that all ranks have of each other, when these have read the old ones.
Everything waits on streams, by flags; the host does not.

W ranks
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.parallel.exchange.arena import PeerError, named, view
from nmoe.effects.parallel.exchange.opening import symmetric
from nmoe.effects.parallel.ranks import Group, Ranks
from nmoe.pure.parallel.levels import level_sizes, part_of
from nmoe.pure.parallel.slots import SLOTS, Slots, slots


class Work:
    """What a collective has put on its streams."""

    def __init__(self, streams: Sequence[torch.cuda.Stream]) -> None:
        self._events = [stream.record_event() for stream in streams]

    def wait(self) -> None:
        """The current stream waits for it, the host does not."""
        for event in self._events:
            torch.cuda.current_stream().wait_event(event)


class Copies:
    """One rank's part in the collectives of a group.

    All ranks call them in the same order, with tensors of the same sizes.
    """

    def __init__(
        self,
        rank: int,
        layout: Slots,
        arenas: Sequence[Tensor],
        addresses: Sequence[int],
        share: Callable[[int], Sequence[Tensor]],
        timeout_s: float,
    ) -> None:
        """One of so many ranks as there are arenas.

        arenas     each [bytes] u8: the symmetric memory of every rank, where this process sees it; zeros
        addresses  where each begins
        share      bytes -> more such memory; collective
        timeout_s  how long a rank is waited for; 0: for ever, which the interpreter needs
        """
        raw = arenas[rank]
        self.rank, self.ranks = rank, len(arenas)
        self._layout, self._raw = layout, raw
        self._areas = [view(arena, layout.areas) for arena in arenas]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=raw.device)
        # both on the device, so that a recorded graph keeps counting
        self._copied = torch.zeros(SLOTS, dtype=torch.int64, device=raw.device)
        self._taken = torch.zeros(SLOTS, dtype=torch.int64, device=raw.device)
        self._opened, self._stored, self._read = torch.zeros(3, 1, dtype=torch.int64, device=raw.device)
        self._share = share
        self._buffers: list[Sequence[Tensor]] = []
        self.missing = torch.zeros(1, dtype=torch.int32, pin_memory=raw.is_cuda)
        self._limit_ns = int(timeout_s * 1e9)
        self._next = 0
        self._streams = [torch.cuda.Stream(raw.device, priority=-1) for _ in range(2)] if raw.is_cuda else []

    def symmetric(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory [size] for parameters, into which the other ranks copy what they updated; zeros. Collective."""
        arenas = self._share(size * dtype.itemsize)
        self._buffers.append(arenas)
        return arenas[self.rank].view(dtype)

    def num_bytes(self) -> int:
        """Symmetric memory of this rank."""
        return self._raw.nbytes + sum(buffers[self.rank].nbytes for buffers in self._buffers)

    def reduce_scatter_(self, flat: Tensor, out: Tensor) -> Work:
        """Start the sum of a flat tensor over the ranks; of the parts each rank has its own. What to wait for.

        flat  [W M] fp32 or bf16
        out   [M] f32; may be the rank's part of `flat`

        Writes:  out.
        """
        return self._start(self.scattering_(flat, out))

    def all_gather_(self, flat: Tensor) -> Work:
        """Start the all-gather of a flat tensor in a symmetric buffer; each rank has its part. What to wait for.

        Writes:  this rank's part everywhere.
        """
        return self._start(self.gathering_(flat))

    def _start(self, work: Generator[None, None, None]) -> Work:
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream())
        for _ in work:
            pass
        return Work(self._streams)

    def scattering_(self, flat: Tensor, out: Tensor) -> Generator[None, None, None]:
        """The reduce-scatter, which yields when a piece has been copied and before it is taken."""
        from nmoe.effects.kernels.exchange.reduce import sum_  # only here: triton is not everywhere

        parts, levels = self._parts(flat), level_sizes(self.ranks)
        for begin, end in self._pieces(parts[0]):
            slot = self._slot()
            with record_function("reduce"):
                self._copy_(slot, [part[begin:end] for part in parts])
            yield
            with record_function("reduce"), self._taking_(slot) as landed:
                sum_(out[begin:end], parts[self.rank][begin:end], landed.view(flat.dtype), self.rank, levels)

    def gathering_(self, flat: Tensor) -> Generator[None, None, None]:
        """The all-gather, which yields before it waits for other ranks."""
        from nmoe.effects.kernels.exchange import push as moves  # only here: triton is not everywhere

        own, layout = self._parts(flat)[self.rank].view(torch.uint8), self._layout
        buffers, at = self._buffers_of(own)
        opened, stored = view(self._raw, layout.opened), view(self._raw, layout.stored)
        words = opened.shape[1]
        with record_function("gather"), self._on(0):
            # what this rank launched before on the stream that starts the all-gather has read what is replaced
            moves.signal_(self._opened, self._addresses, layout.opened.offset, self.rank, words)
        yield
        with record_function("gather"), self._on(0):
            moves.await_flags_(self._opened, opened, self.missing, ahead=0, limit_ns=self._limit_ns)
            for other in self._others():
                buffers[other][at : at + own.numel()].copy_(own)
            moves.signal_(self._stored, self._addresses, layout.stored.offset, self.rank, words)
        yield
        with record_function("gather"), self._on(1):
            moves.await_flags_(self._read, stored, self.missing, ahead=1, limit_ns=self._limit_ns)
            self._read.add_(1)

    def _buffers_of(self, own: Tensor) -> tuple[Sequence[Tensor], int]:
        """The memory of every rank in which a stretch lies, and the bytes before it.

        Raises:  ValueError where it lies in memory that only this rank has.
        """
        for buffers in self._buffers:
            at = own.data_ptr() - buffers[self.rank].data_ptr()
            if 0 <= at <= buffers[self.rank].numel() - own.numel():
                return buffers, at
        raise ValueError(
            "copies: expected a tensor in memory that `symmetric` gave, got another; all-gather it by NCCL"
        )

    def _others(self) -> Iterator[int]:
        """The other ranks, so that no two write to one at a time."""
        for step in range(1, self.ranks):
            yield (self.rank + step) % self.ranks

    def _on(self, number: int) -> AbstractContextManager[object]:
        """Launches inside the block go to a stream: 0 copies, 1 waits for what others copied."""
        return torch.cuda.stream(self._streams[number]) if self._streams else nullcontext()

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """The part of each rank."""
        size = flat.numel() // self.ranks
        parts = flat.view(self.ranks, size)
        return [parts[part_of(rank, self.ranks)] for rank in range(self.ranks)]

    def _pieces(self, part: Tensor) -> Iterator[tuple[int, int]]:
        """Stretches of a part that an area has room for."""
        most = self._layout.areas.shape[-1] // part.itemsize
        for begin in range(0, part.numel(), most):
            yield begin, min(begin + most, part.numel())

    def _slot(self) -> int:
        self._next = (self._next + 1) % SLOTS
        return self._next

    def _copy_(self, slot: int, pieces: Sequence[Tensor]) -> None:
        """Copy a piece to each other rank, when all have freed the slot.

        Writes:  this rank's area of it everywhere, and its flag.
        """
        from nmoe.effects.kernels.exchange import push as moves  # only here: triton is not everywhere

        layout, copied = self._layout, self._copied[slot : slot + 1]
        with self._on(0):
            freed = view(self._raw, layout.freed)[slot]
            moves.await_flags_(copied, freed, self.missing, ahead=0, limit_ns=self._limit_ns)
            for other in self._others():
                values = pieces[other].view(torch.uint8)
                self._areas[other][slot, self.rank, : values.numel()].copy_(values)
            moves.signal_(copied, self._addresses, self._flags(layout.landed.offset, slot), self.rank, freed.shape[1])

    @contextmanager
    def _taking_(self, slot: int) -> Iterator[Tensor]:
        """What has landed [W bytes] u8, which is free again after the block. Writes: this rank's flag everywhere."""
        from nmoe.effects.kernels.exchange import push as moves  # only here: triton is not everywhere

        layout, taken = self._layout, self._taken[slot : slot + 1]
        with self._on(1):
            landed = view(self._raw, layout.landed)[slot]
            moves.await_flags_(taken, landed, self.missing, ahead=1, limit_ns=self._limit_ns)
            yield self._areas[self.rank][slot]
            moves.signal_(taken, self._addresses, self._flags(layout.freed.offset, slot), self.rank, landed.shape[1])

    def _flags(self, offset: int, slot: int) -> int:
        """Bytes from the beginning of an arena to the flags of a slot."""
        return offset + slot * self._layout.landed.size() // SLOTS


@contextmanager
def open_copies(
    ranks: Ranks, device: torch.device, timeout_s: float, *, kernels: str, transport: str
) -> Iterator[Ranks]:
    """The ranks, with copy engines for their collectives where all are GPUs of one host that reach each other's memory.

    Between hosts, and where GPUs do not reach each other, NCCL carries everything. Collective.

    kernels    "torch": flags need Triton's kernels, so NCCL
    transport  of an exchange; "nvshmem": torch has one kind of symmetric memory in a process, so NCCL

    Raises:  PeerError, from what came first, when the time for a rank had run out.
    """
    taken = transport == "nvshmem" and ranks.experts.size > 1
    if ranks.world.size == 1 or device.type != "cuda" or kernels == "torch" or taken or not _reached(ranks, device):
        yield ranks
        return
    with ExitStack() as scope:
        world = scope.enter_context(_opened(ranks.world, device, timeout_s))
        replicas = ranks.replicas
        if replicas.size == ranks.world.size:
            replicas = world
        elif replicas.size > 1:
            replicas = scope.enter_context(_opened(replicas, device, timeout_s))
        yield attrs.evolve(ranks, world=world, replicas=replicas)


def _reached(ranks: Ranks, device: torch.device) -> bool:
    """Whether all ranks are on one host and each GPU reaches every other's memory."""
    if len(set(ranks.hosts)) > 1:
        return False
    indices = [int(text) for text in ranks.all_gather_text(str(device.index))]
    reached = [torch.cuda.can_device_access_peer(device.index, other) for other in indices if other != device.index]
    return set(ranks.all_gather_text(str(all(reached)))) == {"True"}


@contextmanager
def _opened(group: Group, device: torch.device, timeout_s: float) -> Iterator[Group]:
    """A group with copy engines."""
    layout = slots(group.size)
    handle: Any = group.handle
    with ExitStack() as scope:

        def share(size: int) -> tuple[Sequence[int], Sequence[Tensor]]:
            raw, addresses, arenas = scope.enter_context(symmetric(size, handle, device))
            # `raw` is what owns this rank's memory, for as long as a parameter lies in it
            return addresses, [raw if rank == group.rank else arena for rank, arena in enumerate(arenas)]

        addresses, arenas = share(layout.size)
        copies = Copies(group.rank, layout, arenas, addresses, lambda size: share(size)[1], timeout_s)
        try:
            yield attrs.evolve(group, copies=copies)
        except PeerError:
            raise
        except BaseException as error:
            late = int(copies.missing)
            if late:
                raise PeerError(
                    f"rank {group.rank}: expected every rank's gradients and parameters within {timeout_s:g} s, got "
                    f"nothing from {named([late - 1])}; look at that rank's log, or raise parallel.timeout_s if it was "
                    "only slow"
                ) from error
            raise
