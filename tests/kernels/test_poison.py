"""A kernel that leaves an element unwritten, or uses one that it did not load, fails every test that looks at it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.parallel.exchange import arena
from nmoe.pure.formats import nvfp4
from tests.kernels import samples
from tests.kernels.exchange.ranks import case, open_ranks
from tests.poison import poison

ALLOCATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda x: torch.empty(x.shape, dtype=x.dtype),
    "empty_like": lambda x: torch.empty_like(x),
    "empty_like, by name": lambda x: torch.empty_like(input=x, memory_format=torch.contiguous_format),
    "empty_strided": lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
    "empty_permuted": lambda x: torch.empty_permuted(x.shape, (0,), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(x.shape),
    "new_empty_strided": lambda x: x.new_empty_strided(x.shape, x.stride()),
}


def forgetful(x: Tensor, allocate: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of `x` but for its last element."""
    y = allocate(x)
    samples.forget_last[(1,)](x, y, x.numel(), block=16)  # pyright: ignore[reportArgumentType]
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_an_element_left_unwritten_is_seen(allocate: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.zeros(10, dtype=dtype)
    y = forgetful(x, allocate)
    assert torch.equal(y[:-1], x[:-1])
    assert torch.equal(y[-1].nan_to_num(7), torch.tensor(poison(dtype), dtype=dtype).nan_to_num(7)) and y[-1] != x[-1]


def test_a_byte_that_nobody_wrote_is_no_number_in_fp8() -> None:
    """Codes of fp8 are allocated and stored as bytes; of NVFP4 two codes a byte are two sixes."""
    code = torch.tensor([poison(torch.uint8)], dtype=torch.uint8)
    assert code.view(torch.float8_e4m3fn).float().isnan().all()
    assert nvfp4.decode(nvfp4.unpack(code)).tolist() == [-6, -6]


class Forgetful(torch.autograd.Function):
    """Forgets in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return forgetful(gradients[0].contiguous(), ALLOCATIONS["empty_like"])


def test_it_is_seen_in_a_backward_pass() -> None:
    x = torch.ones(10, requires_grad=True)
    Forgetful.apply(x).sum().backward()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    assert x.grad is not None and x.grad.isnan().tolist() == [False] * 9 + [True]


def test_what_a_mask_kept_from_being_read_is_seen() -> None:
    y = torch.zeros(1)
    samples.sum_beyond[(1,)](torch.ones(10), y, 10, block=16)  # pyright: ignore[reportArgumentType]
    assert y.isnan().all()


def test_arenas_are_poisoned_but_for_the_flags() -> None:
    e = open_ranks(case("random", 4, 16, 16, 4, 2), [2, 2], dedup=True)[0]
    assert e.raw[: e.fields.counts.offset].count_nonzero() == 0
    for field in (e.fields.counts, e.fields.source):
        assert (arena.view(e.raw, field) == poison(torch.int32)).all()
    for field in (e.fields.gate, e.fields.gate_gradient, e.fields.land, e.fields.land_gradient, e.fields.back):
        assert arena.view(e.raw, field).isnan().all()


def test_a_device_context_outlives_the_poison() -> None:
    """In a process whose first device context is entered while memory is poisoned, as in that of a whole test run."""
    program = """if True:
        import pytest, torch
        from tests.poison import poison_everything_
        with pytest.MonkeyPatch.context() as patch:
            poison_everything_(patch)
            with torch.device("meta"):
                during = torch.empty(2)
        with torch.device("meta"):
            after = torch.empty(2)
        print(during.device, after.device)
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "meta meta\n"
