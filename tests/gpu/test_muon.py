"""Muon's kernels on a GPU: bf16 against fp64, twice the same, never waiting, in the memory that the plan counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.device import cpu, ops
from nmoe.effects.kernels.optim.newton_schulz import orthogonalize, padded
from nmoe.pure.core.init import ones
from nmoe.pure.core.layout import Slot
from nmoe.pure.core.spec import Role, Spec
from nmoe.pure.formats import master
from nmoe.pure.optim import muon as optim
from nmoe.pure.optim.update import joint_settings, matrix_settings, rule
from tests.kernels.truth import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

SHAPES = [(1, 1, 100), (2, 100, 1), (3, 257, 129), (2, 129, 300), (4, 704, 512), (1, 1408, 2048), (2, 2048, 1408)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("falls", [False, True], ids=["normal", "singular values 1/k"])
def test_directions(shape: tuple[int, int, int], falls: bool) -> None:
    x = normal(*shape, device="cuda")
    if falls:
        u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
        x = (u / torch.arange(1, u.shape[-1] + 1, device="cuda") @ v).float()
    truth = optim.orthogonalize(x.double(), bf16=False)
    plain = optim.orthogonalize(x, bf16=True).double()
    scale = 1 / torch.linalg.vector_norm(x, dim=(1, 2))
    found: list[Tensor] = []
    for _ in range(2):
        mine = padded(*shape, x, torch.bfloat16)
        mine.copy_(x)
        found.append(orthogonalize(mine, scale))
    assert torch.equal(*found)
    assert (found[0].double() - truth).norm() < 1.5 * (plain - truth).norm() + 2e-3 * truth.norm()


def test_parameters_together_are_the_same_parameters() -> None:
    """Bit for bit, whatever is orthogonalised beside a matrix: ranks share parameters out in more than one way."""
    up, matrix = Spec(("E", "D", "2", "F"), Role.EXPERT, ones), Spec(("D", "F"), Role.MATRIX, ones)
    slots: list[Slot] = []
    for spec, shape in [(up, (3, 256, 2, 176)), (matrix, (256, 176)), (up, (1, 256, 2, 176)), (matrix, (256, 352))]:
        offset = slots[-1].offset + slots[-1].size() + 128 if slots else 0
        slots.append(Slot(path=str(offset), spec=spec, shape=shape, offset=offset))
    size = slots[-1].offset + slots[-1].size()
    muon_ = ops.arena_ops(torch.device("cuda")).update_("muon")
    start = normal(size, device="cuda")

    def run(groups: list[list[Slot]]) -> tuple[Tensor, Tensor]:
        high, low = master.split(start)
        buffer, slope = normal(size, seed=1, device="cuda"), normal(size, seed=2, device="cuda")
        for group in groups:
            part = slice(group[0].offset, group[-1].offset + group[-1].size())
            muon_(
                *(each[part] for each in (high, low, buffer, slope)),
                allowed=torch.tensor(True, device="cuda"),
                shrink=torch.tensor(0.5, device="cuda"),
                updates=torch.tensor(1, device="cuda"),
                lr=torch.tensor(0.1, dtype=torch.float64, device="cuda"),
                momentum=0.9,
                decay=0.1,
                **joint_settings("muon", group, {}, bf16=True),
            )
        return master.join(high, low), buffer

    together, alone = run([slots]), run([[slot] for slot in slots])
    assert all(torch.equal(*both) for both in zip(together, alone, strict=True))


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32], ids=["gradient bf16", "gradient fp32"])
@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32], ids=["moments bf16", "moments fp32"])
@pytest.mark.parametrize(
    "which",
    [
        (Spec(("E", "D", "2", "F"), Role.EXPERT, ones), (3, 256, 2, 176), {}),
        (Spec(("E", "F", "D"), Role.EXPERT, ones), (3, 176, 256), {}),
        (Spec(("D", "A+B"), Role.MATRIX, ones), (100, 77), {"A": 50, "B": 27}),
    ],
    ids=["up", "down", "side by side"],
)
def test_updates(which: tuple[Spec, tuple[int, ...], dict[str, int]], moments: Any, gradient: Any) -> None:
    """Twice the same bits without waiting for the device, and near the rule in plain torch."""
    spec, shape, dims = which
    size = math.prod(shape)
    how: dict[str, Any] = {
        "allowed": torch.tensor(True, device="cuda"),
        "shrink": torch.tensor(0.5, device="cuda"),
        "updates": torch.tensor(1, device="cuda"),
        "lr": torch.tensor(0.1, dtype=torch.float64, device="cuda"),
        "momentum": 0.9,
        "decay": 0.1,
        **matrix_settings("muon", spec, shape, dims, bf16=True),
    }
    start = normal(size, device="cuda")
    part = optim.matrices(how["by_matrix"], size)
    muon_ = ops.arena_ops(torch.device("cuda")).update_("muon")

    def run(update: Any, *first: Any) -> tuple[Tensor, Tensor, Tensor]:
        high, low = master.split(start)
        buffer = normal(size, seed=1, dtype=moments, device="cuda")
        slope = normal(size, seed=2, dtype=gradient, device="cuda")
        torch.cuda.synchronize()
        change = update(*first, high, low, buffer, slope, **how)
        assert not slope.any()
        return master.join(high, low), buffer.float(), change

    plain = run(cpu.update_, rule("muon"))
    ours = run(muon_)
    torch.cuda.synchronize()
    high, low = master.split(start)
    buffer = normal(size, seed=1, dtype=moments, device="cuda")
    slope = normal(size, seed=2, dtype=gradient, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        change = muon_(high, low, buffer, slope, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.1 * optim.kernel_bytes(part, 2) + 2**16
    assert torch.equal(master.join(high, low), ours[0]) and torch.equal(change, ours[2])
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-2 if moments is torch.bfloat16 else 1e-5, atol=1e-6)
    assert (ours[0] - plain[0]).norm() < 0.03 * (plain[0] - start).norm()
    torch.testing.assert_close(ours[2], plain[2], rtol=1e-2, atol=0)
