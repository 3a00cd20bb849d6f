"""Triton's interpreter for the tests of the kernels: turned on in time, and kept from what it computes wrongly."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch


def turn_on() -> None:
    """Every kernel imported from now on runs in Triton's interpreter, in this process only.

    `triton.jit` decides when it decorates, for Triton's own functions too, so this comes before the first import.

    Raises:  RuntimeError when Triton was imported to compile, or a kernel was.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
        import triton.knobs

        # Remembered by the process; the environment would tell it to children, which compile.
        triton.knobs.runtime.interpret = True
        del os.environ["TRITON_INTERPRET"]
    from triton import language
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.runtime.jit import JITFunction

    kernels = [module for name, module in sys.modules.items() if name.startswith("nmoe.effects.kernels")]
    compiled = [
        f"{module.__name__}.{key}"
        for module in (language, *kernels)
        for key, value in vars(module).items()
        if isinstance(value, JITFunction) and not isinstance(value, GluonJITFunction)  # no interpreter runs Gluon
    ]
    if compiled:
        raise RuntimeError(
            f"tests/kernels: kernels are imported after the interpreter is on, got {compiled[0]} imported to compile; "
            "run tests/kernels in a process of its own: python -m pytest tests/kernels"
        )


def check_arguments(arguments: tuple[Any, ...]) -> None:
    """Refuse what Triton 3.6 interprets wrongly without a word: arithmetic on bf16, and rounding to it.

    Raises:  TypeError for a bf16 tensor among the arguments of a kernel.
    """
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor) and argument.dtype is torch.bfloat16:
            raise TypeError(
                f"argument {place} of an interpreted kernel: fp32 or fp16, got bf16, which the interpreter computes "
                "wrongly; test bf16 in tests/gpu"
            )


def poison(pointers: Any) -> Any:
    """What a masked load of the interpreter finds where it may not read: NaN, or the largest integer.

    pointers  handle of the pointers that are loaded from
    """
    import numpy as np
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    kind = pointers.get_element_ty()
    dtype: Any = np.zeros(0, _get_np_dtype(kind)).dtype
    value = np.nan if dtype.kind == "f" else np.iinfo(dtype).max if dtype.kind in "iu" else True
    return TensorHandle(np.full_like(pointers.data, value, dtype=dtype), kind)


def to_e4m3(source: Any, kind: Any) -> Any:
    """fp32 as e4m3 codes, rounded by torch as a GPU does: ties to even, which Triton's interpreter does not keep to."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    codes = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn).view(torch.uint8)
    return TensorHandle(codes.numpy(), kind)


def overlapping(arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of arguments that lie in the same memory, element for element: neighbours in one tensor do not."""
    tensors = {name: x if isinstance(x, torch.Tensor) else getattr(x, "base", None) for name, x in arguments.items()}
    return [
        (one, other)
        for (one, a), (other, b) in combinations(tensors.items(), 2)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _meet(a, b)
    ]


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share a byte."""
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    touched = torch.zeros(a.untyped_storage().nbytes(), dtype=torch.bool)
    _bytes(touched, a).fill_(True)
    return bool(_bytes(touched, b).any())


def _bytes(storage: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """View of a byte a place of storage, as `x` lies in it."""
    size = x.element_size()
    return storage.as_strided((*x.shape, size), (*(step * size for step in x.stride()), 1), x.storage_offset() * size)
