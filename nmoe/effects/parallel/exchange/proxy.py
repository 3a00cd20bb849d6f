"""The host proxy: what a rank puts for other hosts leaves through registered memory, a thread, and TCP.

1. A put copies its rows or words, with ranks and places, into an area of registered memory, in the order of the
   stream: on a CPU a copy, on a GPU one into pinned memory. The signal writes the epoch of the barrier last.
2. A thread polls that word. For each other host it picks the items that go there, each once, whatever number of ranks
   and choices there want them, and sends them with their places to the rank of that host with this rank's number on
   its own; then the epoch.
3. That rank's thread receives into an area of its own for this connection, and writes the epoch into a word last. The
   stream, where it waits at the barrier, waits for this word, copies every item to its places in the arenas of its
   host by the memory they share, and signals in the sender's place there. Ranks wait for the same flags as within a
   host.

A thread calls nothing of CUDA: a launch could wait for a lock that the main thread holds while it allocates or loads a
kernel, which may take until the device is idle, that is until the barrier is over.

An area is written again two barriers later at the earliest: then every rank has signalled the first of them, for which
it had waited for this rank's signal, so that the rows had been delivered. Nothing is allocated in a step but messages.

W ranks · L ranks of a host · K places of an item · M items
"""

from __future__ import annotations

import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.effects.parallel.exchange.arena import Exchange, Put, Relay, Transport, fence
from nmoe.errors import InputError
from nmoe.pure.parallel.exchange_arena import Field, Fields, Sizes

PAUSE_S = 100e-6
"""Time between two looks at the word that a signal writes."""

HEADER = struct.Struct("<iiiq")
"""Kind of a message, number of its area, items, epoch."""

ITEMS, SIGNAL, END = range(3)

TOKEN_BYTES = 32
"""Of the secret by which a rank knows a connection of its own run."""

GREETING_S = 5.0
"""Time in which a connection has to say whose it is: a stranger keeps nobody waiting longer."""

Key = tuple[Field, int]
"""An area: a field, and dimensions of what is put there (1: words)."""


@attrs.frozen(kw_only=True)
class Area:
    """Registered memory through which the puts of one field leave, or arrive."""

    field: Field
    values: Tensor  # [M ...]
    to: Tensor  # [M K] i32
    at: Tensor  # [M K] i32
    count: Tensor  # [1] i32, places of all items that are sent
    posted: Tensor  # [1] i64, epoch of the barrier before which they leave


@attrs.frozen(kw_only=True)
class Hosts:
    """Which ranks this one shares memory with, and which it sends through."""

    rank: int
    ranks: int
    per_host: int

    def first(self) -> int:
        """The first rank of this host."""
        return self.rank - self.rank % self.per_host

    def counterparts(self) -> list[int]:
        """Of each other host the rank with this one's number there."""
        return [rank for rank in range(self.rank % self.per_host, self.ranks, self.per_host) if rank != self.rank]


class Proxy:
    """Areas, connections and threads of one rank, open as long as its exchange."""

    def __init__(
        self,
        hosts: Hosts,
        open_areas: Callable[[], Mapping[Key, Area]],
        lost: Tensor,
        connections: Mapping[int, socket.socket],
        device: torch.device,
    ) -> None:
        """open_areas: allocates them; lost: [W] gets true for a rank whose connection breaks."""
        self.hosts, self.connections = hosts, connections
        self.areas = open_areas()
        self.inboxes = {rank: open_areas() for rank in connections}
        self.rung = _registered(1, torch.int64, device)  # epoch of the last signal
        self.arrived = _registered(hosts.ranks, torch.int64, device)  # by rank, epoch of its last signal that came
        self.bytes_sent = 0
        self._staged: list[Key] = []  # puts since the last delivery: every rank puts the same fields
        self._lost, self._device = lost, device
        self._sent, self._closing = 0, False
        self._threads = [
            threading.Thread(target=self._send, name="rows to other hosts", daemon=True),
            *(
                threading.Thread(target=self._receive, args=(rank,), name=f"rows from {rank}", daemon=True)
                for rank in connections
            ),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, *, orderly: bool) -> None:
        """End the threads and close the connections.

        orderly  every other rank closes too, after all its puts: wait for the last of them
        """
        self._closing = True
        if not orderly:
            for connection in self.connections.values():
                _shut(connection)
        for thread in self._threads:
            thread.join()
        for connection in self.connections.values():
            connection.close()

    def stage_(self, e: Exchange, put: Put) -> None:
        """Copy what a put sends, with its places, into its area, in the order of the stream. Writes: that area."""
        key = (put.field, put.values.dim())
        area, (to, at) = self.areas[key], put.places()
        items = len(put.values)
        self._staged.append(key)
        for target, source in ((area.values, put.values), (area.to, to), (area.at, at)):
            target[:items].copy_(source, non_blocking=True)
        if put.valid is None:
            area.count.fill_(to.numel())
        else:
            which = 2 if put.back else 0
            area.count.copy_(put.valid[which : which + 1], non_blocking=True)
        area.posted.copy_(e.epoch + 1, non_blocking=True)

    def deliver_(self, e: Exchange, peers: Transport, relay: Relay) -> None:
        """Wait for what ranks of other hosts put before their signal, store it, and pass the signal on.

        Writes:  those fields and flags in the arenas of this host.
        """
        relay.await_(e, self.arrived, list(self.connections))
        for rank, inbox in self.inboxes.items():
            for key in self._staged:
                _store_(attrs.evolve(e, rank=rank), inbox[key], peers)
        relay.pass_on_(e, list(self.connections))
        self._staged.clear()

    def flush(self) -> None:
        """Wait until everything that was signalled has left, or a connection broke."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        while self._sent < int(self.rung) and not self._lost.any():
            time.sleep(PAUSE_S)

    def _send(self) -> None:
        """Send what is signalled, in the order of the areas, until the end."""
        while True:
            rung = int(self.rung)
            if self._sent == rung:
                if self._closing:
                    break
                time.sleep(PAUSE_S)
                continue
            fence()
            epoch = self._sent + 1  # a second signal may follow before this thread has seen the first, not a third
            for number, area in enumerate(self.areas.values()):
                if int(area.posted) == epoch:
                    self._send_items(number, area, epoch)
            for rank in self.connections:
                self._send_to(rank, HEADER.pack(SIGNAL, 0, 0, epoch))
            self._sent = epoch
        for rank in self.connections:
            self._send_to(rank, HEADER.pack(END, 0, 0, 0))

    def _send_items(self, number: int, area: Area, epoch: int) -> None:
        """Send to each other host the items that any of its ranks wants, each once, or that there are none."""
        choices = area.to.shape[1]
        items = int(area.count) // choices
        to, at = area.to[:items], area.at[:items]
        for rank in self.connections:
            first = rank - rank % self.hosts.per_host
            there = (to >= first) & (to < first + self.hosts.per_host)
            which = there.any(1).nonzero().flatten()
            wanted = to[which].masked_fill(~there[which], self.hosts.ranks)
            self._send_to(rank, HEADER.pack(ITEMS, number, len(which), epoch))
            for part in (wanted, at[which], area.values[which]):
                self._send_to(rank, _bytes(part))

    def _send_to(self, rank: int, message: Any) -> None:
        """Send all of a message, unless the connection broke: the others continue."""
        if self._lost[rank]:
            return
        try:
            self.connections[rank].sendall(message)
        except OSError:
            self._lost[rank] = True
        else:
            self.bytes_sent += len(message)

    def _receive(self, rank: int) -> None:
        """Receive what a rank of another host sends for this host, until nothing follows."""
        connection, header = self.connections[rank], bytearray(HEADER.size)
        inbox = list(self.inboxes[rank].values())
        try:
            while True:
                _receive_into(connection, memoryview(header))
                kind, number, items, epoch = HEADER.unpack(header)
                if kind == END:
                    return
                if kind == ITEMS:
                    area = inbox[number]
                    for part in (area.to, area.at, area.values):
                        _receive_into(connection, _bytes(part[:items]))
                    area.count.fill_(items * area.to.shape[1])
                else:
                    fence()
                    self.arrived[rank] = epoch
        except (OSError, EOFError):
            self._lost[rank] = True


def areas(sizes: Sizes, f: Fields, device: torch.device) -> dict[Key, Area]:
    """Registered memory for everything that a rank may put between two barriers."""
    ranks, tokens, top_k = sizes.ranks, sizes.tokens, sizes.top_k
    row = (sizes.hidden_size,)
    shapes: list[tuple[Field, tuple[int, ...], int]] = [
        (f.counts, (1, sizes.experts + ranks), ranks),
        (f.counts, (ranks,), 1),  # the words by which an exchange tests its mappings
        (f.gate, (tokens * top_k,), 1),
        (f.gate_gradient, (sizes.capacity,), 1),
        (f.land, (tokens, *row), top_k),
        (f.land_gradient, (tokens, *row), top_k),
        (f.back, (sizes.capacity, *row), 1),
    ]
    if sizes.dedup:
        shapes.append((f.source, (tokens * top_k,), 1))
    if sizes.fp8:
        shapes.append((f.land_codes, (tokens, f.land_codes.shape[1]), top_k))
    return {
        (field, len(shape)): Area(
            field=field,
            values=_registered(shape, field.dtype, device),
            to=_registered((shape[0], choices), torch.int32, device),
            at=_registered((shape[0], choices), torch.int32, device),
            count=_registered(1, torch.int32, device),
            posted=_registered(1, torch.int64, device),
        )
        for field, shape, choices in shapes
    }


def _store_(e: Exchange, area: Area, peers: Transport) -> None:
    """Put what has arrived to the ranks of this host. Writes: a field of their arenas.

    e  with the rank that it came from
    """
    if area.field == e.fields.counts and area.values.dim() > 1:
        count, tokens = area.values[0].split([e.sizes.experts, e.sizes.ranks])
        peers.put_counts_(e, count, tokens)
        return
    # on a CPU a put is of all items; a device has all and a number, which the host does not know when it launches
    which = slice(None if e.raw.is_cuda else int(area.count) // area.to.shape[1])
    put = Put(
        field=area.field,
        values=area.values[which],
        to=area.to[which],
        at=area.at[which],
        valid=area.count,
        programs=e.programs,
    )
    (peers.put_rows_ if put.values.dim() > 1 else peers.put_words_)(e, put)


def over(peers: Transport, relay: Relay, proxy: Proxy) -> Transport:
    """Puts by memory that a host shares to its own ranks, and by the proxy to those of other hosts.

    peers  writes to ranks of this host alone
    """
    hosts = proxy.hosts

    def put_rows_(e: Exchange, put: Put) -> None:
        peers.put_rows_(e, put)
        proxy.stage_(e, put)

    def put_words_(e: Exchange, put: Put) -> None:
        peers.put_words_(e, put)
        proxy.stage_(e, put)

    def put_counts_(e: Exchange, count: Tensor, tokens: Tensor | None) -> None:
        peers.put_counts_(e, count, tokens)
        tail = count.new_zeros(hosts.ranks) if tokens is None else tokens[: hosts.ranks]
        to = torch.arange(hosts.ranks, dtype=torch.int32, device=count.device)[None]
        row = torch.cat([count, tail]).int()[None]
        proxy.stage_(e, Put(field=e.fields.counts, values=row, to=to, at=torch.full_like(to, e.rank)))

    def barrier_(e: Exchange, *, signal: bool, wait: bool) -> None:
        if signal:
            peers.barrier_(e, signal=True, wait=False)
            relay.ring_(e, proxy.rung)
        if wait:
            proxy.deliver_(e, peers, relay)
            peers.barrier_(e, signal=False, wait=True)

    return Transport(
        put_rows_=put_rows_,
        put_words_=put_words_,
        put_counts_=put_counts_,
        barrier_=barrier_,
        flush=lambda e: proxy.flush(),
    )


@contextmanager
def connections(
    hosts: Hosts, group: dist.ProcessGroup, rendezvous: str, timeout_s: float
) -> Iterator[dict[int, socket.socket]]:
    """A connection to the counterpart on each other host, until the block ends.

    Collective. A rank listens at a free port, and knows a connection of this run by a secret that went through the
    process group.

    rendezvous  address that every host reaches: the interface to it is the one that is used
    Raises:     InputError when a host cannot be reached.
    """
    others = hosts.counterparts()
    secret = secrets.token_bytes(TOKEN_BYTES)
    opened: dict[int, socket.socket] = {}
    with _listener() as listener:
        entries: list[Any] = [None] * hosts.ranks
        mine = (_own_address(rendezvous), listener.getsockname()[1], secret)
        dist.all_gather_object(entries, mine, group=group)
        try:
            for other in others:
                if other < hosts.rank:
                    opened[other] = _connected(hosts.rank, other, entries[other], timeout_s)
            later = [other for other in others if other > hosts.rank]
            opened |= _accepted(listener, later, secret, hosts.rank, timeout_s)
            for connection in opened.values():
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield opened
        finally:
            for connection in opened.values():
                connection.close()


def _connected(rank: int, other: int, entry: tuple[str, int, bytes], timeout_s: float) -> socket.socket:
    """A connection to a rank that listens."""
    address, port, secret = entry
    try:
        connection = socket.create_connection((address, port), timeout=timeout_s)
        connection.sendall(secret + rank.to_bytes(4, "little"))
    except OSError as error:
        raise InputError(
            f"parallel.transport: expected rank {other} at {address}:{port} within {timeout_s:g} s, got "
            f"{error.strerror or error}; let hosts reach each other on every TCP port, or raise parallel.timeout_s"
        ) from error
    return connection


def _accepted(
    listener: socket.socket, others: Sequence[int], secret: bytes, rank: int, timeout_s: float
) -> dict[int, socket.socket]:
    """Connections from ranks that know the secret; others are closed."""
    end = time.monotonic() + timeout_s
    opened: dict[int, socket.socket] = {}
    while missing := [other for other in others if other not in opened]:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError as error:
            raise InputError(
                f"parallel.transport: expected a connection to rank {rank} from rank {missing[0]} within "
                f"{timeout_s:g} s, got none; let hosts reach each other on every TCP port, or raise parallel.timeout_s"
            ) from error
        connection.settimeout(GREETING_S)
        other = _greeted(connection, secret)
        if other in missing:
            opened[other] = connection
        else:
            connection.close()
    return opened


def _greeted(connection: socket.socket, secret: bytes) -> int | None:
    """The rank that a connection comes from; None: no rank of this run."""
    greeting = bytearray(TOKEN_BYTES + 4)
    try:
        _receive_into(connection, memoryview(greeting))
    except (OSError, EOFError):
        return None
    known = secrets.compare_digest(bytes(greeting[:TOKEN_BYTES]), secret)
    return int.from_bytes(greeting[TOKEN_BYTES:], "little") if known else None


def _listener() -> socket.socket:
    """A socket that listens on every interface at a free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_address(rendezvous: str) -> str:
    """By which other hosts reach this one: the interface to the rendezvous, or its own name where that is here."""
    family, kind, _, _, address = socket.getaddrinfo(rendezvous, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0]
    return rendezvous if own == address[0] else own


def _receive_into(connection: socket.socket, target: memoryview) -> None:
    """Fill a buffer from a connection.

    Raises:  EOFError when it ends before.
    """
    position = 0
    while position < len(target):
        received = connection.recv_into(target[position:])
        if not received:
            raise EOFError("the connection ended")
        position += received


def _shut(connection: socket.socket) -> bool:
    """End both directions, so that no thread waits there; whether the other end had not done so."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    array: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _registered(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in memory of the host that the device reaches without its help."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
