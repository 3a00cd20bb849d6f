"""What a computation on the device "meta" would take: tensors it makes, and those autograd keeps of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """The storages that autograd keeps, each once, masks and indices apart.

    leaves  parameters and tables, which are there anyway
    """

    def __init__(self, leaves: Iterable[Any]) -> None:
        self._leaves = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        self._storages: dict[int, Any] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in (torch.bool, torch.int64):
            self.add(tensor)
        return tensor

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that is kept in another way."""
        self._storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(storage.nbytes() for key, storage in self._storages.items() if key not in self._leaves)


def kept_by_blocks(
    patch: pytest.MonkeyPatch, kind: Any, leaves: Iterable[Any], loss: Callable[[], Tensor]
) -> tuple[int, int]:
    """Bytes that autograd keeps of `loss`, and elements of the largest tensor that it and its gradient make.

    kind  the module whose `again` computes blocks again in the backward pass: of those, their arguments are kept
    """
    held, recompute = Kept(leaves), kind.again

    def again(attend: Any, *arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, Tensor):
                held.add(argument)
        return recompute(attend, *arguments)

    patch.setattr(kind, "again", again)
    with Largest() as forward, held:
        result = loss()
    with Largest() as backward:
        result.backward()
    patch.setattr(kind, "again", recompute)
    return held.nbytes(), max(forward.elements, backward.elements)


class Peak(TorchDispatchMode):
    """Most bytes at once in storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in args if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._held:
                    self._held[key] = storage.nbytes()
                    weakref.finalize(storage, self._held.pop, key, None)
        self.bytes = max(self.bytes, sum(self._held.values()))
        return result
