"""Two to four hosts with a network between them, on one machine: the bits of one host, its faults, and deaths."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import pytest

from nmoe.config.sections import Config
from nmoe.effects.train import run
from nmoe.effects.train.world import World
from nmoe.pure.model.model import Batch
from tests.effects.parallel import cluster, exchange_rank
from tests.effects.parallel.cluster import CUT, FIRST, End, Network, on_hosts
from tests.effects.parallel.exchange_ranks import forked, found_by
from tests.effects.parallel.rank_runs import as_world, train
from tests.effects.parallel.test_ranks import STEPS, config_of, digests, losses

LONG = pytest.mark.long
POOR = Network(delay_s=0.005, bytes_per_s=2e6, loss=0.02)
TIMEOUT_S = 10.0
READ = 2 * 4
"""Sequences that were read when the second host goes: two steps."""


def exchanged(hosts: int, per_host: int, folder: Path, network: Network) -> list[End]:
    """Ends of ranks that exchange rows of a mixture over hosts."""

    def call(rank: int) -> int:
        store = str(folder / "store")
        exchange_rank.main("dedup", "cpu", rank, hosts * per_host, store, str(per_host), FIRST)
        return 0

    return on_hosts(hosts, per_host, folder, call, network)


@pytest.mark.parametrize(
    ("hosts", "per_host", "network"),
    [
        (2, 2, POOR),
        pytest.param(4, 2, Network(delay_s=0.001), marks=LONG),
        pytest.param(4, 1, Network(loss=0.05), marks=LONG),
        pytest.param(2, 4, Network(bytes_per_s=1e6), marks=LONG),
    ],
)
def test_rows_over_a_network_have_the_bits_of_one_host(
    tmp_path: Path, hosts: int, per_host: int, network: Network
) -> None:
    """Five passes forward and backward, over packets that are late, slow to leave, and lost."""
    ends = exchanged(hosts, per_host, tmp_path / "hosts", network)
    assert [end.code for end in ends] == [0] * hosts * per_host, ends
    one = forked("dedup", hosts * per_host, tmp_path / "one")
    assert [found_by(end.text)["bits"] for end in ends] == [rank["bits"] for rank in one]


def configured(sources: Path, work: Path, name: str, experts: int = 4) -> Config:
    """Four ranks, so many of which share out all experts."""
    config = as_world(config_of(sources, work, name), 4, experts=experts, transport="proxy", capacity=0.0)
    return attrs.evolve(config, parallel=attrs.evolve(config.parallel, timeout_s=TIMEOUT_S))


def on_two_hosts(
    config: Config, folder: Path, leave: Callable[[Path], None], ranks: tuple[int, ...] = (2, 3)
) -> list[End]:
    """How a training of four ranks ended on two hosts, when some ranks leave before a step."""

    def reading(rank: int, read: Callable[[int], Batch]) -> Callable[[int], Batch]:
        def until_gone(cursor: int) -> Batch:
            if rank in ranks and cursor >= READ:
                leave(folder)
            return read(cursor)

        return until_gone

    def call(rank: int) -> int:
        return run.main(config, {}, ("nmoe", "run"), "x", (), World(read=partial(reading, rank)))

    return on_hosts(2, 2, folder, call, Network(delay_s=0.001))


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four ranks on one host, from the first step to the last."""
    work = tmp_path_factory.mktemp("whole")
    ends = train(configured(sources, work, "whole"), work / "out")
    assert [code for code, _ in ends] == [0] * 4, ends
    return work / "runs" / "whole"


def killed(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def cut_off(folder: Path) -> None:
    (folder / CUT).write_text("1")


@LONG
def test_a_training_on_two_hosts_is_that_of_one(whole: Path, sources: Path, tmp_path: Path) -> None:
    ends = on_two_hosts(configured(sources, tmp_path, "two"), tmp_path / "out", killed, ranks=())
    assert [end.code for end in ends] == [0] * 4, ends
    two = tmp_path / "runs" / "two"
    assert losses(two) == losses(whole)
    for step in range(1, STEPS + 1):
        assert digests(two, step) == digests(whole, step), step


@LONG
def test_experts_over_pairs_of_hosts_and_replicas_over_the_rest(sources: Path, tmp_path: Path) -> None:
    """Four hosts of one rank, each two of which have all experts: moments and gradients are sharded over the pairs."""
    configs = {name: configured(sources, tmp_path, name, experts=2) for name in ("one", "four")}

    def call(rank: int) -> int:
        return run.main(configs["four"], {}, ("nmoe", "run"), "x")

    ends = on_hosts(4, 1, tmp_path / "out", call, Network(delay_s=0.001))
    assert [end.code for end in ends] == [0] * 4, ends
    assert [code for code, _ in train(configs["one"], tmp_path / "one")] == [0] * 4
    assert losses(tmp_path / "runs" / "four") == losses(tmp_path / "runs" / "one")
    assert digests(tmp_path / "runs" / "four", STEPS) == digests(tmp_path / "runs" / "one", STEPS)


@pytest.mark.parametrize(
    "leave",
    [killed, pytest.param(stopped, marks=LONG), pytest.param(cut_off, marks=LONG)],
    ids=lambda how: how.__name__,
)
def test_a_host_that_is_gone_is_named_and_the_rest_goes_on_with_fewer(
    whole: Path, sources: Path, tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    """Every rank that is left ends and names that host; as many ranks on one host go on to the same bits."""
    config = configured(sources, tmp_path, "two")
    ends = on_two_hosts(config, tmp_path / "out", leave)
    for end in ends[:2]:
        assert end.code == 1, ends
        (told,) = [line for line in end.text.splitlines() if line.startswith("nmoe: rank ")]
        assert "expected every rank within" in told or "expected an open connection to" in told, told
        assert " on host host1" in told, told
    gone = {"killed": [-9, -9], "stopped": [None, None], "cut_off": [1, 1]}[leave.__name__]
    assert [end.code for end in ends[2:]] == gone, ends
    again = train(config, tmp_path / "again")
    assert [code for code, _ in again] == [0] * 4 and "resume         at step" in again[0][1], again
    assert digests(tmp_path / "runs" / "two", STEPS) == digests(whole, STEPS)


def test_where_namespaces_are_forbidden_the_tests_count_as_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(flags: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(cluster, "_unshare", forbidden)
    with pytest.raises(pytest.skip.Exception, match="expected the right to make them, got Operation not permitted"):
        on_hosts(2, 1, tmp_path, lambda rank: 0)
