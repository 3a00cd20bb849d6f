"""The harness itself: what it tells of kernels that are known, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import aot, interpreter, samples
from tests.kernels.aot import Compiled, Request

SCALE = {"x": "*bf16", "y": "*bf16", "size": "i32", "factor": "fp32"}
MATMUL = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "k_size": "i32"}
HERE = "tests.kernels.samples"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Compiled]:
    """The samples by name and target."""
    requests = {
        "wide": Request(kernel=f"{HERE}:scale", signature=SCALE, constants={"block": 1024}, aligned=["x", "y", "size"]),
        "narrow": Request(kernel=f"{HERE}:scale", signature=SCALE, constants={"block": 1024}, aligned=[]),
        "matmul": Request(kernel=f"{HERE}:matmul", signature=MATMUL, constants={"m": 64, "n": 64, "k": 64}),
        "spilling": Request(kernel=f"{HERE}:matmul", signature=MATMUL, constants={"m": 128, "n": 256, "k": 16}),
        "atomic": Request(
            kernel=f"{HERE}:add_into", signature={"x": "*fp32", "total": "*fp32"}, constants={"block": 128}
        ),
    }
    found = aot.compile_all(list(requests.values()), tmp_path_factory.mktemp("triton"))
    places = [(name, target) for target in aot.TARGETS for name in requests]
    return dict(zip(places, found, strict=True))


@pytest.mark.parametrize("target", aot.TARGETS)
def test_what_a_kernel_became(compiled: dict[tuple[str, int], Compiled], target: int) -> None:
    def at(name: str) -> Compiled:
        return compiled[name, target]

    assert {each.target for (_, there), each in compiled.items() if there == target} == {target}
    assert f".target sm_{target}a" in at("wide").ptx
    assert (at("wide").wide, at("wide").narrow) == (2, 0)
    assert (at("narrow").wide, at("narrow").narrow) == (0, 16)
    for name in ("wide", "narrow", "matmul", "atomic"):
        assert at(name).problems() == []
        assert 8 <= at(name).registers < 255, name
    assert at("matmul").problems(tensor_cores=True) == []
    assert (at("matmul").wgmma > 0, at("matmul").tcgen05 > 0) == (target == 90, target == 100)
    assert at("wide").problems(tensor_cores=True)
    assert [each.atomics > 0 for each in (at("atomic"), at("wide"))] == [True, False]


def test_spills_are_seen(compiled: dict[tuple[str, int], Compiled]) -> None:
    """On sm_90 a 128 by 256 accumulator has no place in the registers of four warps."""
    spilling = compiled["spilling", 90]
    assert spilling.spills > 100
    assert spilling.problems()
    (left,) = spilling.problems(spills=spilling.spills)
    assert left.endswith("products wait for one another: insufficient register resources for the wgmma pipeline")


@pytest.mark.parametrize(
    "said",
    [
        "(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register "
        "resources for the function 'kernel'",
        "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register "
        "resources in the function 'kernel'",
    ],
)
def test_products_that_wait_are_seen_however_it_is_said(said: str) -> None:
    assert aot.serialized(f"ptxas info    : {said}\n") == ["insufficient register resources"]


def test_a_kernel_that_does_not_compile_says_so(tmp_path: Path) -> None:
    incomplete = Request(kernel=f"{HERE}:scale", signature={"x": "*bf16"}, constants={"block": 1024})
    with pytest.raises(RuntimeError, match="every argument has a type or a value.*'y', 'size', 'factor'"):
        aot.compile_all([incomplete], tmp_path, targets=[90])


def test_what_a_launch_passes_at_run_time_has_no_value(tmp_path: Path) -> None:
    """Compiled in, it would tell the compiler more than a launch does: that 16 divides it, for one."""
    types = {name: kind for name, kind in SCALE.items() if name != "size"}
    fixed = Request(kernel=f"{HERE}:scale", signature=types, constants={"block": 1024, "size": 4096})
    with pytest.raises(RuntimeError, match=r"a launch passes \['size'\] at run time; give a type, got a value"):
        aot.compile_all([fixed], tmp_path, targets=[90])


def test_the_interpreter_runs_here_and_takes_no_bf16() -> None:
    x, y = torch.randn(100), torch.zeros(100)
    samples.scale[(1,)](x, y, 100, 2.0, block=128)  # pyright: ignore[reportArgumentType]
    assert torch.equal(y, 2 * x)
    with pytest.raises(TypeError, match="argument 0 .*fp32 or fp16, got bf16"):
        samples.scale[(1,)](x.bfloat16(), y, 100, 2.0, block=128)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="got bf16"):
        samples.scale[(1,)](x, size=100, factor=2.0, block=128, y=y.bfloat16())  # pyright: ignore[reportArgumentType]


def test_a_kernel_imported_to_compile_is_refused() -> None:
    text = "import triton.language\nfrom tests.kernels import interpreter\ninterpreter.turn_on()"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert "kernels are imported after the interpreter is on, got triton.language." in done.stderr


def test_children_of_this_process_compile() -> None:
    interpreter.turn_on()  # a second time: nothing to do
    text = "import triton; print(triton.knobs.runtime.interpret)"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout == "False\n"
