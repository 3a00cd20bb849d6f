"""No shipped kernel has a data race, a spilled register, or more memory than there is; each kind of race is seen."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.effects import kernels
from nmoe.effects.kernels.optim import adamw
from tests.kernels import aot, shipped, test_shipped
from tests.kernels.aot import Request
from tests.kernels.attention import test_shipped_dsa as sparse
from tests.kernels.attention import test_shipped_dsa_dense as dense
from tests.kernels.attention import test_shipped_gqa as grouped
from tests.kernels.attention import test_shipped_kda as delta
from tests.kernels.attention import test_shipped_mla as attention
from tests.kernels.attention import test_shipped_nsa as native
from tests.kernels.exchange import test_exchange_aot, test_nvshmem_aot
from tests.kernels.moe import test_block_scaled, test_shipped_fp8, test_shipped_hopper, test_shipped_hopper_fp8
from tests.kernels.moe import test_shipped_moe as moe
from tests.kernels.optim import test_shipped_muon

OTHERS = {
    **shipped.of_dispatch(256, 8),
    **shipped.of_few(7168, 2048, 256, 8),
    **shipped.of_router(256, 8),
    **shipped.of_cached(),
    **shipped.of_single(),
    **shipped.of_biases(),
    **shipped.of_assembly(),
    **shipped.of_exchange(),
}
"""What ships and no other test compiles, for as many experts as any preset has."""

FEWER = {
    **{
        f"{name}, {experts} experts": made
        for experts in (64, 160)
        for name, made in shipped.of_dispatch(experts).items()
    },
    **{f"{name}, 64 experts": made for name, made in shipped.of_few().items()},
    **{
        f"{name}, {experts} experts": made
        for experts, top_k in ((16, 1), (64, 4), (160, 6), (512, 10))
        for name, made in shipped.of_router(experts, top_k).items()
    },
    **{f"{name}, 2 ranks": made for name, made in shipped.of_exchange(2, 64, 6).items()},
}
"""The same kernels at other presets' sizes: registers spill at one size and not at another."""


def sample(name: str, pointers: str, *, same: Mapping[str, str] | None = None, **constants: Any) -> Request:
    integers = {"carried": {"number": "i32", "chosen": "i32"}}.get(name, {})
    return Request(
        kernel=f"tests.kernels.samples:{name}",
        signature={**dict.fromkeys(pointers.split(), "*fp32"), **integers},
        constants={"block": 1024, **constants} if name != "count_up" else constants,
        same=same or {},
    )


MATMUL = Request(
    kernel="tests.kernels.samples:matmul",
    signature={"a": "*bf16", "b": "*bf16", "c": "*bf16", "k_size": "i32"},
    constants={"m": 64, "n": 64, "k": 64},
    aligned=["a", "b", "c", "k_size"],
    same={"c": "a"},
)
"""In place: asynchronous copies of `a` are in flight, and no barrier says that they are over for every thread."""

SAMPLES: dict[str, tuple[Request, list[str]]] = {
    "shifted": (sample("shift", "x", ordered=False), ["x"]),
    "shifted, ordered": (sample("shift", "x", ordered=True), []),
    "scratch": (sample("reverse_by_scratch", "x scratch y", ordered=False), ["scratch"]),
    "scratch, ordered": (sample("reverse_by_scratch", "x scratch y", ordered=True), []),
    "scalar": (sample("count_up", "counter", ordered=False), ["counter"]),
    "scalar, ordered": (sample("count_up", "counter", ordered=True), []),
    "two arguments": (sample("move", "x y"), []),
    "two arguments, one tensor": (sample("move", "x y", same={"y": "x"}), ["x"]),
    "carried by a loop": (sample("carried", "x y total"), ["y"]),
    "reduced": (sample("max_in_place", "x"), []),
    "one thread": (sample("add_one", "x"), []),
    "asynchronous": (MATMUL, ["a"]),
    "warps of their own": (sample("side_by_side", "x y z", chained=False), []),
    "warps of their own, chained": (sample("side_by_side", "x y z", chained=True), ["y"]),
}
"""A kernel, and the buffers that race."""


def before_the_barrier(folder: Path) -> Request:
    """AdamW as it was until 2026-11-28: the gradient is cleared with no barrier after it is read."""
    source = Path(str(adamw.__file__)).read_text()
    barrier = "            tl.debug_barrier()\n"
    assert source.count(barrier) == 1
    (folder / "adamw_before.py").write_text(source.replace(barrier, ""))
    return attrs.evolve(shipped.update("bf16", "fp32", "bf16"), kernel="adamw_before:update_kernel")


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_kernels_that_no_other_test_compiles(tmp_path: Path, target: int) -> None:
    compiled = aot.compile_all([*OTHERS.values()], tmp_path, targets=[target])
    assert {name: wrong for name, kernel in zip(OTHERS, compiled, strict=True) if (wrong := kernel.problems())} == {}


@pytest.mark.long
def test_they_fit_at_other_sizes(tmp_path: Path) -> None:
    compiled = aot.compile_all([*FEWER.values()], tmp_path)
    names = list(FEWER) * len(aot.TARGETS)
    assert {name: wrong for name, kernel in zip(names, compiled, strict=True) if (wrong := kernel.problems())} == {}


def test_each_kind_of_race_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    requests = [*(request for request, _ in SAMPLES.values()), before_the_barrier(tmp_path)]
    *samples, old = aot.compile_all(requests, tmp_path / "triton", targets=[90])
    racing = {name: sorted({race.split(":")[0] for race in c.races}) for name, c in zip(SAMPLES, samples, strict=True)}
    assert racing == {name: expected for name, (_, expected) in SAMPLES.items()}
    assert [race.split(":")[0] for race in old.races] == ["gradient"], old.races
    assert any("data race: gradient" in problem for problem in old.problems())


def requests() -> list[Request]:
    """Every request of this folder's tests."""
    attended = [
        attention.request(name, getattr(tiles, name), documents)
        for tiles in attention.SHIPPED.values()
        for name in attention.PRODUCTS
        for documents in (False, True)
    ]
    return [
        *(make() for make in (*test_shipped.QUICK.values(), *test_shipped.REST.values())),
        *OTHERS.values(),
        *attended,
        *(request for target in aot.TARGETS for request in grouped.requests(grouped.GPT_OSS, target)),
        *(request for target in aot.TARGETS for request in delta.requests(delta.KIMI, target)),
        *(request for target in aot.TARGETS for request in sparse.requests(sparse.V32, target)),
        *(request for target in aot.TARGETS for request in dense.requests(sparse.V32, target)),
        *(request for target in aot.TARGETS for request in native.requests(native.PAPER, target)),
        attention.rotation(inverse=True),
        *map(attention.gradients_of_keys, attention.HOPPER),
        *map(attention.gradient_of_queries, attention.QUERIES),
        *(request for target in aot.TARGETS for request in moe.requests(target)),
        *test_shipped_hopper.requests(),
        *test_shipped_hopper.of_the_activation(),
        *test_shipped_hopper_fp8.requests(),
        *test_shipped_fp8.products(),
        *test_shipped_fp8.passes(),
        *map(test_block_scaled.request, test_block_scaled.INSTRUCTION),
        *test_shipped_muon.REQUESTS.values(),
        *test_exchange_aot.REQUESTS.values(),
        *test_nvshmem_aot.requests(""),
    ]


def test_every_kernel_is_compiled_ahead_of_time() -> None:
    shipping: set[str] = set()
    for package in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(package.name)
        names = {name for name, value in vars(module).items() if launched(name, value, package.name)}
        shipping |= {f"{package.name}:{name}" for name in names}
    assert len(shipping) > 25
    assert shipping == {request.kernel for request in requests()}


def launched(name: str, value: Any, module: str) -> bool:
    return name.endswith("_kernel") and getattr(getattr(value, "fn", None), "__module__", None) == module


def test_every_launch_with_one_tensor_twice_is_compiled_so() -> None:
    compiled = {(r.kernel.removeprefix(f"{shipped.KERNELS}."), *pair) for r in requests() for pair in r.same.items()}
    listed = {(kernel, *pair) for kernel, pairs in shipped.SAME.items() for pair in pairs.items()}
    assert listed <= compiled
