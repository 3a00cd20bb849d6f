"""The kernels between hosts compile and link with NVSHMEM's device functions; no network is here to run them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from nmoe.effects.kernels.exchange.nvshmem import LIBRARY, SET, WARPS
from tests.kernels import aot
from tests.kernels.aot import Request

KERNELS = "nmoe.effects.kernels.exchange.nvshmem"


def requests(library: str) -> list[Request]:
    """Both kernels, linked with NVSHMEM's device functions at a path."""
    return [
        Request(
            kernel=f"{KERNELS}:put_runs_kernel",
            signature={"source": "i64", "target": "i64", "end": "*i32", "shift": "*i32", "BYTES": "i32"}
            | {"LOCAL": "i32", "W": "i32"},
            constants={"BACK": False},
            warps=WARPS,
            libraries={"nvshmem": library},
        ),
        Request(
            kernel=f"{KERNELS}:signal_kernel",
            signature={"epoch": "*i64", "flag": "i64"},
            constants={"W": 2, "SET": SET},
            warps=1,
            libraries={"nvshmem": library},
        ),
    ]


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
    header = next(Path(str(each.locate())) for each in files if each.name == "nvshmem_common_transport.h")
    assert f"NVSHMEM_SIGNAL_SET = {SET}," in header.read_text()
    puts, signals = aot.compile_all(requests(library), tmp_path, targets=[90])
    for each in (puts, signals):
        assert each.races == []
        assert "nvshmemi_device_state_d" in each.ptx, "NVSHMEM's state is not there: its functions were not linked in"
        assert ".extern .func" not in each.ptx, "a function is declared and not there"
    assert puts.registers > 0 and signals.registers > 0
