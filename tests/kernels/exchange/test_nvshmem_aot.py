"""The kernels between hosts compile and link with NVSHMEM's device functions; no network is here to run them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from nmoe.effects.kernels.exchange.nvshmem import AT_LEAST, BLOCK, ROWS, SET, WARPS
from nmoe.effects.kernels.exchange.push import block_of
from nmoe.pure.parallel.exchange_arena import FLAG_BYTES
from tests.kernels import aot
from tests.kernels.aot import Request

KERNELS = "nmoe.effects.kernels.exchange.nvshmem"
LIBRARY = "libnvshmem_device.bc"
HEADERS = ("nvshmem_common_transport.h", "nvshmem_constants.h")


def requests(library: str) -> list[Request]:
    """Those that are linked with NVSHMEM's device functions, at a path, and the copy before a put."""
    places = dict.fromkeys(("item", "to", "at"), "*i32") | {"addresses": "*i64"}
    pointers = places | dict.fromkeys(("valid", "pes"), "*i32")
    numbers = dict.fromkeys(("BYTES", "W", "M", "SHARE", "PROGRAMS", "VALID"), "i32")
    return [
        Request(
            kernel=f"{KERNELS}:nvshmem_put_kernel",
            signature={"source": "i64", "target": "i64", **pointers, **numbers},
            constants={"BLOCK": BLOCK},
            warps=WARPS,
            libraries={"nvshmem": library},
        ),
        Request(
            kernel=f"{KERNELS}:nvshmem_barrier_kernel",
            signature={"epoch": "*i64", "addresses": "*i64", "arrived": "i64", "missing": "*i32", "pes": "*i32"}
            | {"OFFSET": "i32", "ME": "i32", "W": "i32", "LIMIT": "i64"},
            constants={"FLAG": FLAG_BYTES, "SET": SET, "AT_LEAST": AT_LEAST, "SIGNAL": True, "WAIT": True},
            warps=1,
            libraries={"nvshmem": library},
        ),
        STAGE,
    ]


STAGE = Request(
    kernel=f"{KERNELS}:stage_kernel",
    signature={"x": "*bf16", "stage": "*bf16", "item": "*i32", "to": "*i32", "addresses": "*i64", "valid": "*i32"}
    | dict.fromkeys(("D", "K", "W", "M", "PROGRAMS"), "i32"),
    constants={"VALID": 0, "ROWS": ROWS, "BLOCK": block_of(2048)},
    warps=8,
    aligned=("x", "stage", "item", "to", "addresses", "valid", "D"),
)


def test_rows_are_staged_in_stores_of_16_bytes(tmp_path: Path) -> None:
    for built in aot.compile_all([STAGE], tmp_path):
        assert built.problems() == [] and built.atomics == 0
        assert "st.global.v4" in built.ptx


@pytest.mark.long
def test_segment_puts_link_with_nvshmem(tmp_path: Path) -> None:
    try:
        files = metadata.files("nvidia-nvshmem-cu13") or []
    except metadata.PackageNotFoundError:
        pytest.skip(
            "nvidia-nvshmem-cu13 is not installed: kernels between hosts are NOT compiled; pip install --no-deps "
            "nvidia-nvshmem-cu13"
        )
    library = next(str(each.locate()) for each in files if each.name == LIBRARY)
    headers = {name: next(Path(str(each.locate())) for each in files if each.name == name) for name in HEADERS}
    signals, comparisons = (headers[name].read_text() for name in HEADERS)
    assert f"NVSHMEM_SIGNAL_SET = {SET}," in signals
    listed = comparisons[comparisons.index("NVSHMEM_CMP_EQ = 0,") :].split(",")
    assert listed[AT_LEAST].strip() == "NVSHMEM_CMP_GE"
    puts, barrier = aot.compile_all(requests(library)[:2], tmp_path, targets=[90])
    for each in (puts, barrier):
        assert each.races == []
        assert "nvshmemi_device_state_d" in each.ptx, "NVSHMEM's state is not there: its functions were not linked in"
        assert ".extern .func" not in each.ptx, "a function is declared and not there"
    assert puts.registers > 0 and barrier.registers > 0
