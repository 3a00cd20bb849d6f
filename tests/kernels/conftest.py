"""Kernels of this folder run in Triton's interpreter, and never on bf16 there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import interpreter

interpreter.turn_on()

OF_THE_INTERPRETER = (
    # numpy's view of how Triton 3.6 reads the bounds of a loop
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
    # numpy warns of what a GPU does without a word: infinity less infinity, exp beyond the range
    "ignore::RuntimeWarning:triton.runtime.interpreter",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the interpreter warns of, itself, is no error here."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for text in OF_THE_INTERPRETER:
                item.add_marker(pytest.mark.filterwarnings(text))


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
