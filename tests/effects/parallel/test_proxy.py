"""The host proxy: the bits of shared memory, a row once to a host, and who is named when a host is gone."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.effects.parallel.exchange import opening, proxy
from nmoe.effects.parallel.exchange.arena import Exchange, Put, view
from nmoe.effects.parallel.exchange.host import PEER, RELAY, _silent
from nmoe.effects.parallel.exchange.proxy import Hosts, Proxy
from nmoe.errors import InputError
from nmoe.pure.parallel.exchange_arena import Sizes, fields
from tests.effects.parallel.exchange_rank import TIMEOUT_S
from tests.effects.parallel.exchange_ranks import ended, forked
from tests.effects.parallel.test_exchange import RESULTS, running

SIZES = Sizes(ranks=4, experts=8, top_k=3, hidden_size=8, tokens=5, capacity=40, dedup=True, dtype=torch.float32)


@pytest.mark.parametrize("what", ["dedup", "plain"])
def test_hosts_joined_by_the_proxy_have_the_bits_of_one_host(tmp_path: Path, what: str) -> None:
    """Five passes forward and backward of four ranks: on one host, on two of two, and for one of both on four."""
    layouts = {"one": None, "two": 2, **({"four": 1} if what == "dedup" else {})}
    found = {name: forked(what, 4, tmp_path / name, per_host) for name, per_host in layouts.items()}
    for name in layouts:
        assert [rank.get("bits") for rank in found[name]] == [rank["bits"] for rank in found["one"]], found[name]
        assert all(rank[result] < 1e-6 for rank in found[name] for result in RESULTS)


@pytest.mark.long
@pytest.mark.parametrize("what", ["kernels", "fp8"])
def test_the_kernels_send_by_the_proxy_too(tmp_path: Path, what: str) -> None:
    """Interpreted, on two hosts of one rank: bitwise the kernels of one rank."""
    with running(what, 2, tmp_path, per_host=1) as processes:
        for found in [ended(process, 300.0) for process in processes]:
            assert [found.get(name) for name in RESULTS] == [0.0] * 6, found


@contextmanager
def two_hosts(
    *, late: bool = False
) -> Iterator[tuple[Exchange, Proxy, list[torch.Tensor], Callable[[Sequence[Put]], None]]]:
    """Rank 0 of hosts {0, 1} and {2, 3}, the arenas of both, and how rank 2 delivers what rank 0 put.

    late  the threads of rank 0 are started by the test
    """
    f, cpu = fields(SIZES), torch.device("cpu")
    arenas = [torch.zeros(f.size, dtype=torch.uint8) for _ in range(4)]
    ends = socket.socketpair()

    def opened(rank: int, connection: socket.socket, far: int) -> tuple[Exchange, Proxy]:
        mapped = tuple(arena if other // 2 == rank // 2 else None for other, arena in enumerate(arenas))
        e = opening._exchange(
            rank=rank,
            sizes=SIZES,
            f=f,
            raw=arenas[rank],
            peers=mapped,
            addresses=[0] * 4,
            timeout_s=5.0,
            programs=1,
            hosts=tuple("aabb"),
            transport=PEER,
        )
        hosts = Hosts(rank=rank, ranks=4, per_host=2)
        carried = Proxy(hosts, partial(proxy.areas, SIZES, f, cpu), e.lost, {far: connection}, cpu)
        return attrs.evolve(e, transport=proxy.over(PEER, RELAY, carried)), carried

    def deliver(puts: Sequence[Put]) -> None:
        """At the barrier after puts of the same fields, which are of nothing."""
        for put in puts:
            receiver.stage_(there, attrs.evolve(put, to=torch.full_like(put.to, 4)))
        there.transport.barrier_(there, signal=True, wait=False)
        receiver.deliver_(there, PEER, RELAY)

    (here, sender), (there, receiver) = opened(0, ends[0], 2), opened(2, ends[1], 0)
    for each in (receiver,) if late else (sender, receiver):
        each.start()
    try:
        yield here, sender, arenas, deliver
    finally:
        for each in (sender, receiver):
            each.stop(orderly=False)


def test_a_row_crosses_once_to_a_host_and_lands_at_each_place() -> None:
    """A token for both ranks of the other host, one for one of them, one that stays, one that goes nowhere."""
    x = torch.arange(40.0).view(5, 8)
    to = torch.tensor([[2, 3, 0], [3, 4, 4], [0, 1, 4], [4, 4, 4], [2, 1, 3]])
    at = torch.tensor([[5, 6, 0], [7, 0, 0], [1, 2, 0], [0, 0, 0], [8, 3, 9]])
    with two_hosts() as (e, sender, arenas, deliver):
        put = Put(field=e.fields.land, values=x, to=to, at=at)
        e.transport.put_rows_(e, put)
        e.transport.barrier_(e, signal=True, wait=False)
        deliver([put])
        assert [int(view(arena, e.fields.arrived)[0, 0]) for arena in arenas] == [1] * 4
        land = [view(arena, e.fields.land) for arena in arenas]
        for rank in range(4):
            wanted = torch.zeros_like(land[rank])
            for token, choice in (to == rank).nonzero().tolist():
                wanted[at[token, choice]] = x[token]
            assert torch.equal(land[rank], wanted), rank
        # three tokens, each with 3 ranks and 3 places, and the signal
        e.transport.flush(e)
        assert sender.bytes_sent == 2 * proxy.HEADER.size + 3 * (8 * 4 + 2 * 3 * 4)


def test_words_and_counts_arrive_before_the_signal_that_follows_them() -> None:
    """Two signals one after the other, the second before the thread has seen the first."""
    with two_hosts(late=True) as (e, sender, arenas, deliver):
        count, tokens = torch.arange(8), torch.tensor([1, 2, 3, 4])
        gates = Put(
            field=e.fields.gate,
            values=torch.arange(15.0),
            to=torch.arange(15).view(5, 3) % 4,
            at=torch.arange(15).view(5, 3) // 4,
        )
        e.transport.put_counts_(e, count, tokens)
        e.transport.barrier_(e, signal=True, wait=False)
        e.transport.put_words_(e, gates)
        e.transport.barrier_(e, signal=True, wait=False)
        sender.start()
        deliver([Put(field=e.fields.counts, values=torch.zeros(1, 12), to=torch.zeros(1, 4), at=torch.zeros(1, 4))])
        assert [int(view(arena, e.fields.arrived)[0, 0]) for arena in arenas] == [2, 2, 1, 1]
        deliver([gates])
        for rank, arena in enumerate(arenas):
            assert int(view(arena, e.fields.arrived)[0, 0]) == 2
            assert view(arena, e.fields.counts)[0].tolist() == [*range(8), 1, 2, 3, 4]
            here = [float(number) for number in range(15) if number % 4 == rank]
            assert view(arena, e.fields.gate)[: len(here)].tolist() == here


@pytest.mark.parametrize("how", ["dead", "asleep"])
def test_a_rank_of_another_host_that_is_gone_is_named_with_its_host(tmp_path: Path, how: str) -> None:
    """By the rank that its connection leads to at once or after the time-out, by the other after the time-out."""
    first, second, *_ = [rank.get("error", "") for rank in forked(how, 4, tmp_path, per_host=2, gone=3)]
    late = f"expected every rank of the exchange within {TIMEOUT_S:g} s, got nothing from rank 3 on host host1 in phase"
    assert first.startswith(f"PeerError: rank 0: {late}"), first
    broken = "expected an open connection to rank 3 on host host1, got its end in phase"
    assert second.startswith(f"PeerError: rank 1: {broken if how == 'dead' else late}"), second


def test_who_delivers_for_another_host_is_blamed_in_its_place() -> None:
    """Rank 0 of hosts {0, 1} and {2, 3}: what rank 3 sends arrives by rank 1."""
    with two_hosts() as (e, *_):
        assert _silent(e, [1, 3]) == [1]
        assert _silent(e, [2, 3]) == [2, 3]
        assert e.named([2, 3]) == "ranks 2, 3 on host b" and e.named([1, 2]) == "ranks 1, 2 on hosts a, b"


@pytest.mark.parametrize(
    ("hosts", "transport", "told"),
    [
        ("aabb", "proxy", ""),
        ("aaaa", "peer", ""),
        ("aaab", "proxy", "parallel.ranks: expected equally many ranks on every host, got 3 on a, 1 on b; start as"),
        ("abab", "proxy", "parallel.experts: expected neighbouring ranks on each host, got rank 0 on a, rank 1 on b"),
        ("aabb", "peer", "on one host, got rank 2 on b and rank 0 on a; lower parallel.experts to the ranks of a host"),
    ],
)
def test_hosts_that_no_exchange_can_span_are_refused(hosts: str, transport: str, told: str) -> None:
    problems = list(opening._hosts_problems(tuple(hosts), transport))
    assert len(problems) == bool(told) and all(told in problem for problem in problems), problems


def test_a_stranger_at_the_port_is_sent_away_and_a_host_that_does_not_come_is_named() -> None:
    secret = b"s" * proxy.TOKEN_BYTES
    with proxy._listener() as listener:
        port = listener.getsockname()[1]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        strangers[0].sendall(b"x" * proxy.TOKEN_BYTES + (2).to_bytes(4, "little"))
        strangers[1].close()
        friend = proxy._connected(2, 0, ("127.0.0.1", port, secret), 5.0)
        opened = proxy._accepted(listener, [2], secret, 0, 30.0)
        opened[2].sendall(b"hello")
        assert list(opened) == [2] and friend.recv(5) == b"hello" and strangers[0].recv(1) == b""
        with pytest.raises(InputError, match="expected a connection to rank 0 from rank 2 within 0.1 s, got none; let"):
            proxy._accepted(listener, [2], secret, 0, 0.1)
        for each in (strangers[0], friend, opened[2]):
            each.close()
    with pytest.raises(InputError, match="parallel.transport: expected rank 0 at 127.0.0.1:.* got Connection refused"):
        proxy._connected(2, 0, ("127.0.0.1", port, secret), 5.0)


def test_a_host_goes_by_the_interface_that_leads_to_the_rendezvous() -> None:
    assert proxy._own_address("127.0.0.1") == "127.0.0.1"
    assert proxy._own_address("localhost") == "localhost"
