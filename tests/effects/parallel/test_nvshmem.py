"""What NVSHMEM lacks is said in one line before it opens; what it reads of the environment is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nmoe.effects.parallel import ranks
from nmoe.effects.parallel.exchange import Sizes, nvshmem, open_exchange, opening
from nmoe.effects.parallel.launch import MULTICAST_OFF, from_environment
from nmoe.errors import InputError
from nmoe.pure.parallel.exchange_arena import fields
from tests.effects.parallel.rank_runs import on_ranks

OFF = dict(MULTICAST_OFF)
MIB = 2**20
HOST = ("a", "a")


def test_the_heap_holds_the_arena_and_one_host_looks_for_no_network() -> None:
    found = nvshmem.environment(OFF, 3 * MIB, HOST)
    assert int(found.pop("NVSHMEM_SYMMETRIC_SIZE")) >= 3 * MIB + 9216, "and torch's own words"
    assert found == {"NVSHMEM_REMOTE_TRANSPORT": "none"}
    assert set(nvshmem.environment(OFF, 3 * MIB, ("a", "b"))) == {"NVSHMEM_SYMMETRIC_SIZE"}


def test_what_a_user_has_set_stays() -> None:
    given = {**OFF, "NVSHMEM_SYMMETRIC_SIZE": "1.5g", "NVSHMEM_REMOTE_TRANSPORT": "ibrc"}
    assert nvshmem.environment(given, 1024 * MIB, HOST) == {}


@pytest.mark.parametrize("size", ["1G", "1024M", "1073741824", "1048576K", "0.0009T", "much", "-1G", ""])
def test_a_heap_that_is_too_small_is_refused(size: str) -> None:
    told = rf"NVSHMEM_SYMMETRIC_SIZE: expected at least \d+ bytes, the arena of this config, got '{size}'; unset it"
    with pytest.raises(InputError, match=told):
        nvshmem.environment({**OFF, "NVSHMEM_SYMMETRIC_SIZE": size}, 1024 * MIB, HOST)
    nvshmem.environment({**OFF, "NVSHMEM_SYMMETRIC_SIZE": "1026M"}, 1023 * MIB, HOST)


@pytest.mark.parametrize("value", [None, "0"])
def test_multicast_that_is_on_is_refused(value: str | None) -> None:
    environ = {} if value is None else {"NVSHMEM_DISABLE_NVLS": value}
    with pytest.raises(
        InputError, match="NVSHMEM_DISABLE_NVLS: expected NVLink multicast off .* NVSHMEM_DISABLE_NVLS=1"
    ):
        nvshmem.environment(environ, MIB, HOST)


def test_a_torch_without_it_is_refused_before_ranks_meet() -> None:
    """This torch is one for CPUs; without an exchange nothing is asked of it."""
    launch = from_environment({})
    with pytest.raises(InputError) as caught:
        ranks.check_machine(from_environment(TWO), 2, "nvshmem", cuda=False)
    (problem,) = caught.value.problems
    assert problem.startswith('parallel.transport: expected NVSHMEM for "nvshmem", got no library that torch can load')
    assert "install a torch for CUDA and nvidia-nvshmem-cu13 in the version that it asks for" in problem
    ranks.check_machine(launch, 1, "nvshmem", cuda=False)


TWO = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_the_package_for_another_cuda_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVSHMEM_LIB_DIR", str(tmp_path))
    from torch.distributed._symmetric_memory._nvshmem_triton import NvshmemLibFinder

    monkeypatch.setattr(NvshmemLibFinder, "found_device_lib_path", None)
    (problem,) = nvshmem.problems("12.8")
    assert "no library that torch can load and no functions for kernels" in problem
    assert "nvidia-nvshmem-cu12" in problem


@pytest.mark.parametrize(("hosts", "told"), [("aab", "equally many ranks on every host, got 2 on a, 1 on b")])
def test_hosts_of_unequally_many_gpus_are_refused(hosts: str, told: str) -> None:
    (problem,) = opening._hosts_problems(tuple(hosts), "nvshmem")
    assert told in problem


def test_sizes_without_room_to_send_from_are_refused(tmp_path: Path) -> None:
    """By an exchange of one rank, before anything is allocated."""
    sizes = Sizes(ranks=1, experts=1, top_k=1, hidden_size=8, tokens=4, capacity=4, dedup=False, dtype=torch.float32)

    def call(rank: int) -> int:
        store = dist.FileStore(str(tmp_path / "store"), 1)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=1)
        group: Any = dist.group.WORLD
        with pytest.raises(InputError, match='expected sizes that are staged for "nvshmem" alone, got staged = False'):
            with open_exchange(
                device=torch.device("cpu"), group=group, sizes=sizes, timeout_s=5.0, transport="nvshmem"
            ):
                pass
        return 0

    assert [code for code, _ in on_ranks(1, tmp_path, call)] == [0]


@pytest.mark.parametrize(
    ("hosts", "mapped", "reached"),
    [
        ("....", [True, True], [True, True]),
        ("..ab", [True, True], [False, True]),
        ("....", [False, True], [False, True]),
    ],
)
def test_opening_sets_everything_before_the_first_allocation(
    monkeypatch: pytest.MonkeyPatch, hosts: str, mapped: list[bool], reached: list[bool]
) -> None:
    """In this order, with torch's functions replaced; the memory has a name, by which torch never frees it.

    hosts    of the ranks of the run, the group's last; "b" and "." are this one
    mapped   of each rank of the group whether NVSHMEM has an address
    reached  whether stores are to reach it
    """
    sizes = Sizes(
        ranks=2, experts=2, top_k=1, hidden_size=8, tokens=4, capacity=4, dedup=False, dtype=torch.float32, staged=True
    )
    size, seen = fields(sizes).size, []
    import torch.distributed._symmetric_memory as memory
    from torch._C import _distributed_c10d as c10d
    from torch.distributed._symmetric_memory import _nvshmem_triton as triton_side

    def allocated(*arguments: Any, **named: Any) -> torch.Tensor:
        one = len(set(hosts)) == 1
        assert int(os.environ["NVSHMEM_SYMMETRIC_SIZE"]) > size
        assert os.environ.get("NVSHMEM_REMOTE_TRANSPORT") == ("none" if one else None)
        seen.append(("allocated", arguments[0], named))
        return torch.full(arguments[0], 7, dtype=torch.uint8)

    def met(raw: torch.Tensor, group: object) -> Any:
        seen.append("met")
        addresses = [4096, raw.data_ptr() - 64]
        return SimpleNamespace(
            rank=1, buffer_ptrs=[at if there else 0 for at, there in zip(addresses, mapped, strict=True)]
        )

    def gathered(into: list[object], mine: object) -> None:
        into[:] = [mine if host in ".b" else host for host in hosts]

    for name, value in OFF.items():
        monkeypatch.setenv(name, value)
    for name in ("NVSHMEM_SYMMETRIC_SIZE", "NVSHMEM_REMOTE_TRANSPORT"):
        monkeypatch.setenv(name, "")  # so that what is set is gone again
        monkeypatch.delenv(name)
    monkeypatch.setattr(dist, "get_world_size", lambda *of: 4)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: 2 + rank)
    monkeypatch.setattr(dist, "barrier", lambda **of: seen.append("barrier"))
    monkeypatch.setattr(memory, "set_backend", seen.append)
    monkeypatch.setattr(memory, "rendezvous", met)
    monkeypatch.setattr(c10d._SymmetricMemory, "empty_strided_p2p", allocated)
    monkeypatch.setattr(triton_side, "requires_nvshmem", lambda kernel: seen.append(kernel.fn.__name__))
    monkeypatch.setattr(triton_side.NvshmemLibFinder, "find_device_library", lambda: "library")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *of: None)
    raw, addresses, links = nvshmem.opened(size, sizes, sys, torch.device("cpu"))  # pyright: ignore
    assert seen == [
        "NVSHMEM",
        "nvshmem_put_kernel",
        "nvshmem_barrier_kernel",
        ("allocated", (size,), {"alloc_id": size}),
        "met",
        "barrier",
    ]
    assert addresses == [4096 + 64 if reached[0] else 0, raw.data_ptr()] and not raw.any()
    assert links.pes.tolist() == [2, 3] and links.library == "library"
