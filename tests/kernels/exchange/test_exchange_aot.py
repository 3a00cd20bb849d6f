"""What the exchange's kernels become ahead of time: rows leave 16 bytes at a time, flags are released and acquired."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from nmoe.effects.kernels.exchange import push as exchange
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request
from tests.kernels.moe.test_shipped_moe import requests

KERNELS = "nmoe.effects.kernels"


def request(name: str, signature: str, sizes: str, constants: Mapping[str, int], warps: int = 4) -> Request:
    types = dict(each.split(":") for each in signature.split())
    pointers = [each for each, kind in types.items() if kind.startswith("*")]
    return Request(
        kernel=f"{KERNELS}.{name}_kernel",
        signature=types,
        constants=constants,
        aligned=[*pointers, *sizes.split()],
        warps=warps,
    )


def push(width: int, k: int) -> Request:
    return request(
        "exchange.push:push",
        "x:*bf16 to:*i32 at:*i32 addresses:*i64 valid:*i32 OFFSET:i64 D:i32 W:i32 PROGRAMS:i32",
        "OFFSET D",
        {"VALID": 0, "K": k, "ROWS": exchange.ROWS, "BLOCK": exchange.block_of(width)},
        warps=8,
    )


REQUESTS = {
    "push": push(2048, 6),
    "push 7168": push(7168, 8),
    "return": push(2048, 1),
    "barrier": request(
        "exchange.push:barrier",
        "epoch:*i64 addresses:*i64 arrived:*i64 missing:*i32 OFFSET:i64 ME:i32",
        "OFFSET",
        {"W": 2, "WP": 2, "FLAG": 16, "SIGNAL": 1, "WAIT": 1, "LIMIT": 10**10},
        warps=1,
    ),
    "signal": request(
        "exchange.push:signal",
        "count:*i64 addresses:*i64 OFFSET:i64 ME:i32",
        "OFFSET",
        {"W": 2, "WP": 2, "FLAG": 16},
        warps=1,
    ),
    "await flags": request(
        "exchange.push:await_flags",
        "count:*i64 arrived:*i64 missing:*i32",
        "",
        {"AHEAD": 1, "W": 2, "FLAG": 16, "LIMIT": 10**10},
        warps=1,
    ),
    "ring": request("exchange.push:ring", "epoch:*i64 word:*i64", "", {}, warps=1),
    "await": request(
        "exchange.push:await", "epoch:*i64 word:*i64 missing:*i32 RANK:i32", "", {"LIMIT": 10**10}, warps=1
    ),
    "pass on": request(
        "exchange.push:pass_on",
        "epoch:*i64 addresses:*i64 OFFSET:i64 RANK:i32",
        "OFFSET",
        {"W": 2, "WP": 2, "FLAG": 16},
        warps=1,
    ),
    "plan": request(
        "exchange.plan:plan",
        "counts:*i32 shift:*i32 token_shift:*i32 count:*i32 end:*i32 origin_end:*i32 origin_shift:*i32 valid:*i32 "
        "crossing:*i32 needed:*i32 ME:i32 CAPACITY:i32",
        "",
        {"W": 8, "WP": 8, "E": 256, "EP": 256},
        warps=8,
    ),
    "words": request(
        "exchange.push:words",
        "value:*fp32 item:*i32 to:*i32 at:*i32 addresses:*i64 valid:*i32 OFFSET:i64",
        "OFFSET",
        {"VALID": 0, "INDIRECT": 1, "BLOCK": exchange.WORDS},
    ),
    "expand": request(
        "exchange.push:expand",
        "x:*bf16 source:*i32 out:*bf16 end:*i32 count:*i32 D:i32 E:i32 PROGRAMS:i32",
        "D",
        {"ROWS": exchange.ROWS, "BLOCK": 2048},
        warps=8,
    ),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Each kernel on the measured target."""
    found = aot.compile_all(list(REQUESTS.values()), tmp_path_factory.mktemp("triton"), targets=[90])
    return dict(zip(REQUESTS, found, strict=True))


def instructions(ptx: str) -> Counter[str]:
    """How often each instruction that touches global memory occurs."""
    return Counter(re.findall(r"\b((?:st|ld|atom|red|membar|fence|trap)(?:\.[a-z0-9_:]+)*)", ptx))


def test_rows_leave_16_bytes_at_a_time(compiled: dict[str, Compiled]) -> None:
    for name in ("push", "push 7168", "return", "expand"):
        stores = {key: n for key, n in instructions(compiled[name].ptx).items() if key.startswith("st.global")}
        assert set(stores) == {"st.global.v4.b32"}, (name, stores)
        assert stores["st.global.v4.b32"] >= exchange.ROWS, (name, stores)


def test_rows_of_a_product_leave_16_bytes_at_a_time(tmp_path: Path) -> None:
    leaving = [each for each in requests(90) if "addresses" in each.signature]
    assert len(leaving) == 2
    for each in aot.compile_all(leaving, tmp_path, targets=[90]):
        stores = {key: n for key, n in instructions(each.ptx).items() if key.startswith("st.global")}
        assert stores == {"st.global.v4.b32": 16}, stores


def test_flags_are_released_to_and_acquired_from_the_whole_system(compiled: dict[str, Compiled]) -> None:
    barrier, signal, polling = (instructions(compiled[name].ptx) for name in ("barrier", "signal", "await flags"))
    for found in (barrier, signal):
        assert found["atom.global.sys.release.exch.b64"], found
    for found in (barrier, polling):
        polls = [key for key in found if "acquire" in key]
        assert polls and all(".sys" in key for key in polls), found
        assert found["membar.sys"] == found["trap"] > 0, found


def test_words_of_the_host_are_written_and_read_in_order_and_never_by_an_atomic(compiled: dict[str, Compiled]) -> None:
    """An atomic of the device on memory of the host is none to the host over PCIe: it could undo a write."""
    ring, poll = (instructions(compiled[name].ptx) for name in ("ring", "await"))
    assert ring["st.release.sys.global.b64"] == 1 and poll["ld.acquire.sys.global.b64"] == 2, (ring, poll)
    assert not [key for key in (*ring, *poll) if key.startswith(("atom", "red"))], (ring, poll)
    assert poll["membar.sys"] == poll["trap"] == 1, poll
    assert instructions(compiled["pass on"].ptx)["atom.global.sys.release.exch.b64"], compiled["pass on"].ptx


def test_nothing_spills_and_slots_are_not_drawn_by_atomics(compiled: dict[str, Compiled]) -> None:
    assert [problem for each in compiled.values() for problem in each.problems()] == []
    assert [name for name, each in compiled.items() if each.atomics] == ["barrier", "signal", "pass on"]
