"""Kernels of this folder run in Triton's interpreter, and never on bf16 there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels import interpreter

interpreter.turn_on()


@pytest.fixture(scope="session", autouse=True)
def launches_are_checked() -> Iterator[None]:
    """No interpreted kernel takes bf16, nor one tensor as two arguments where `shipped.SAME` does not list them."""
    from triton.runtime.interpreter import GridExecutor

    from tests.kernels import shipped

    launch = GridExecutor.__call__

    def checked(self: Any, *arguments: Any, **named: Any) -> Any:
        interpreter.check_arguments((*arguments, *named.values()))
        kernel = f"{self.fn.__module__}:{self.fn.__name__}".removeprefix(f"{shipped.KERNELS}.")
        same = shipped.SAME.get(kernel, {})
        for one, other in interpreter.overlapping({**dict(zip(self.arg_names, arguments, strict=False)), **named}):
            if same.get(one, one) != same.get(other, other):
                raise ValueError(
                    f"{kernel}: expected arguments in memory of their own, got {one} and {other} in one; list them "
                    "in tests/kernels/shipped.py and compile a request with them"
                )
        return launch(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", checked)
        yield


@pytest.fixture(scope="session", autouse=True)
def masked_loads_are_poisoned() -> Iterator[None]:
    """Where a mask keeps a load from memory and no value is given instead, a GPU promises nothing: here it is NaN."""
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    def poisoned(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        return load(self, ptrs, mask, interpreter.poison(ptrs) if other is None else other, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", poisoned)
        yield


@pytest.fixture(scope="session", autouse=True)
def e4m3_is_rounded_as_by_a_gpu() -> Iterator[None]:
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    convert = InterpreterBuilder.create_fp_to_fp

    def rounded(self: Any, source: Any, to: Any, *rest: Any) -> Any:
        narrows = source.dtype.scalar == tl.float32 and to.scalar == tl.float8e4nv
        return interpreter.to_e4m3(source, to.scalar) if narrows else convert(self, source, to, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", rounded)
        yield
