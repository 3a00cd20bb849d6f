"""Kernels of this folder run in Triton's interpreter, and never on bf16 there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels import interpreter

interpreter.turn_on()


@pytest.fixture(scope="session", autouse=True)
def no_bf16_in_the_interpreter() -> Iterator[None]:
    """What enters any interpreted kernel is looked at first."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def checked(self: Any, *arguments: Any, **named: Any) -> Any:
        interpreter.check_arguments((*arguments, *named.values()))
        return launch(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", checked)
        yield
