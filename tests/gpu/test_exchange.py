"""The exchange on a GPU: virtual ranks at real size to the bit, replay, never waiting; two processes that share it."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch

from nmoe.effects.device import ops
from nmoe.effects.kernels.moe.moe import Tiles
from nmoe.effects.parallel import exchange
from nmoe.errors import InputError
from tests.effects.parallel.exchange_ranks import ended, started
from tests.kernels.exchange.ranks import Case, case, open_ranks, shared, single_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

NAMES = ("y", "dx", "d_weight", "d_up", "d_down", "d_bias")
ONE_GPU = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def shipped() -> Tiles:
    """The tiles of hidden size 2048 on this device."""
    return ops.mixture_tiles(torch.device("cuda"), 2048, 1408)


def real(kind: str, tokens: int = 4096) -> Case:
    return case(kind, tokens, 2048, 1408, 64, 6, torch.bfloat16, "cuda")


@pytest.mark.parametrize("kind", ["random", "all to one", "none to the first half"])
def test_the_same_bits_on_any_number_of_ranks(kind: str) -> None:
    c, tiles = real(kind), shipped()
    wanted = single_rank(c, tiles)
    for ranks in (1, 2, 4, 8):
        for dedup in (False, True):
            parts = [4096 // ranks] * ranks
            found = shared(c, open_ranks(c, parts, dedup=dedup), parts, tiles)
            same = [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]
            assert dict(zip(NAMES, same, strict=True)) == dict.fromkeys(NAMES, True), (ranks, dedup)


@pytest.mark.parametrize("kind", ["random", "all to one"])
def test_fp8_has_the_bits_of_one_rank(kind: str) -> None:
    c, tiles = real(kind), shipped()
    wanted = single_rank(c, tiles, fp8=True)
    for ranks, dedup in ((1, True), (2, False), (2, True), (8, True)):
        parts = [4096 // ranks] * ranks
        found = shared(c, open_ranks(c, parts, dedup=dedup, fp8=True), parts, tiles)
        same = [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]
        assert dict(zip(NAMES, same, strict=False)) == dict.fromkeys(NAMES[:-1], True), (ranks, dedup)


def test_nothing_waits_for_the_device_and_a_graph_replays_on_other_routing() -> None:
    c, tiles, parts = real("random"), shipped(), [2048, 2048]
    other = real("ties")
    exchanges = open_ranks(c, parts, dedup=True, capacity=4096 * 6)
    shared(c, exchanges, parts, tiles)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        shared(c, exchanges, parts, tiles)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = attrs.evolve(c, **{field.name: getattr(c, field.name).clone() for field in attrs.fields(Case)})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = shared(held, exchanges, parts, tiles)
    for each in (other, c):
        for field in attrs.fields(Case):
            getattr(held, field.name).copy_(getattr(each, field.name))
        graph.replay()
        torch.cuda.synchronize()
        same = [torch.equal(a, b) for a, b in zip(found, single_rank(each, tiles), strict=True)]
        assert dict(zip(NAMES, same, strict=True)) == dict.fromkeys(NAMES, True)


def test_too_many_rows() -> None:
    c, tiles, parts = real("all to one"), shipped(), [2048, 2048]
    exchanges = open_ranks(c, parts, dedup=True, capacity=9000)
    shared(c, exchanges, parts, tiles)
    needed = {int(e.needed) for e in exchanges}
    assert len(needed) == 1 and needed.pop() > 9000
    with pytest.raises(InputError, match="at most 9000 rows on a rank"):
        exchange.check(exchanges[0])


@pytest.mark.parametrize(
    ("what", "per_host"),
    [("kernels", None), ("plain", None), ("slow", None), ("fp8", None), ("kernels", 1), ("plain", 1), ("fp8", 1)],
)
def test_two_processes_on_one_gpu(tmp_path: Path, what: str, per_host: int | None) -> None:
    """Of one host, and of two that the proxy joins."""
    for found in [ended(each, 200) for each in started(what, 2, tmp_path, "cuda:0", ONE_GPU, per_host)]:
        assert "error" not in found, found
        assert [found[name] for name in (*NAMES[:-1], "count")] == [0.0] * 6, found


def test_a_peer_that_hangs_is_named(tmp_path: Path) -> None:
    processes = started("hung", 2, tmp_path, "cuda:0", ONE_GPU)
    try:
        found = ended(processes[0], 200)
        assert found["error"].startswith("PeerError: rank 0: expected every rank of the exchange within 20 s, got")
        assert "from rank 1" in found["error"]
    finally:
        processes[1].kill()
        processes[1].communicate()
