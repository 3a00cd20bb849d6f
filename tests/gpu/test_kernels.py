"""Kernels of the dense path, the loss and the optimizer on a GPU: bf16 against fp64, twice the same, never waiting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels import loss as loss_kernels
from nmoe.effects.kernels import norm as norm_kernels
from nmoe.effects.kernels.moe import report, router, swiglu
from nmoe.effects.kernels.optim import adamw
from nmoe.pure.formats import master
from nmoe.pure.model import experts, loss, norm, route
from nmoe.pure.optim import adamw as optim
from tests.kernels import truth
from tests.kernels.truth import check, graded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")


def targets(rows: int, vocabulary: int, kept: float = 0.8) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(vocabulary, (rows,), generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < kept, drawn, -1).cuda()


def compared(
    ours: Callable[..., Any], plain: Callable[..., Any], inputs: tuple[Tensor, ...], pulls: list[Tensor], **how: float
) -> None:
    """Error against fp64 beside the plain one's; then the same bits again, without waiting for the device."""
    found = graded(ours, inputs, pulls)
    check(found, graded(plain, inputs, pulls), graded(plain, inputs, pulls, torch.float64), **how)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = graded(ours, inputs, pulls)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for place, (a, b) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(a, b), f"result {place} differs from run to run"


@pytest.mark.parametrize("head_sum", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [257, 16384, 16400, 50257])
@pytest.mark.parametrize(("scale", "z_loss"), [(1.0, 0.0), (0.3, 1e-3)])
def test_loss(vocabulary: int, scale: float, z_loss: float, head_sum: torch.dtype) -> None:
    """Two and a half chunks; the last row has no target."""
    inputs = (normal(640, 512), normal(512, vocabulary, seed=1) / 16, targets(640, vocabulary))
    told = {"chunk": 256, "logit_scale": scale, "z_loss": z_loss}
    ours = partial(loss_kernels.linear_cross_entropy, **told, head_sum=head_sum)
    compared(ours, partial(loss.linear_cross_entropy, **told), inputs, [torch.tensor(1 / 512, device="cuda")])


def test_loss_with_offsets_beyond_32_bits() -> None:
    """2^31 and more logits in one chunk: the last rows as they are in a chunk of their own."""
    rows, vocabulary = 11_000, 201_088
    x, head, wanted = normal(rows, 64), normal(64, vocabulary, seed=1) / 4, targets(rows, vocabulary)
    logits, losses = x @ head, torch.empty(2, rows, device="cuda")
    assert logits.numel() > 2**31
    near, near_losses = logits[-8:].clone(), torch.empty(2, 8, device="cuda")
    run = partial(loss_kernels.logits_to_gradient_, logit_scale=1.0, z_loss=0.0, wants_gradient=True)
    run(logits, wanted, losses)
    run(near, wanted[-8:], near_losses)
    assert torch.equal(logits[-8:], near)
    assert torch.equal(losses[:, -8:], near_losses)


def test_loss_holds_no_more_than_it_says() -> None:
    """Extra memory at the peak: logits of a chunk in bf16, the gradients of head and input, 32 MB for cuBLAS."""
    rows, vocabulary, width, chunk = 8192, 65_536, 1024, 2048
    x, head = (each.requires_grad_() for each in (normal(rows, width), normal(width, vocabulary, seed=1) / 32))
    wanted = targets(rows, vocabulary)
    for head_sum, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        total, _ = loss_kernels.linear_cross_entropy(x, head, wanted, chunk=chunk, head_sum=head_sum)
        forward = torch.cuda.max_memory_allocated() - before
        told = 2 * chunk * vocabulary + size * width * vocabulary + 2 * rows * width
        assert forward < told + 2**25, (forward, told)
        del total


@pytest.mark.parametrize(
    "shape", [(1, 2048), (4096, 2048), (3000, 1536), (513, 7168), (2, 100, 512), (300, 100)], ids=str
)
def test_norms(shape: tuple[int, ...]) -> None:
    x, y, gain = normal(*shape), 2 * normal(*shape, seed=1), 1 + normal(shape[-1], seed=2).float() / 4
    pulls = [normal(*shape, seed=3), normal(*shape, seed=4)]
    told = {"eps": 1e-5}
    compared(partial(norm_kernels.rms_norm, **told), partial(norm.rms_norm, **told), (x, gain), pulls[:1])
    compared(partial(norm_kernels.add_rms_norm, **told), partial(norm.add_rms_norm, **told), (x, y, gain), pulls)


@pytest.mark.parametrize("shape", [(1, 2, 2816), (2000, 2, 2816), (3, 100, 2, 11264), (77, 2, 100)], ids=str)
def test_swiglu(shape: tuple[int, ...]) -> None:
    pulls = [normal(*shape[:-2], shape[-1], seed=1)]
    compared(swiglu.swiglu, experts.swiglu, (2 * normal(*shape),), pulls)


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32], ids=["gradient bf16", "gradient fp32"])
@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32], ids=["moments bf16", "moments fp32"])
@pytest.mark.parametrize("halves", [True, False], ids=["bf16 and remainder", "fp32"])
def test_adamw(halves: bool, moments: torch.dtype, gradient: torch.dtype) -> None:
    """Twenty steps beside the reference on this device, both against fp64."""
    size = 100_003
    start = normal(size).float()
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1}
    high, low = master.split(start)
    value = start.clone()
    first, second = (torch.zeros(size, device="cuda", dtype=moments) for _ in range(2))
    plain, plain_moments = start, optim.Moments(first.clone(), second.clone())
    right, right_moments = start.double(), optim.Moments(first.double(), second.double())
    for step in range(1, 21):
        grad_output = normal(size, seed=step).to(gradient)
        told: dict[str, Any] = {
            "updates": torch.tensor(step, device="cuda"),
            "lr": torch.tensor(1e-2, device="cuda", dtype=torch.float64),
            **numbers,
        }
        guards = {"allowed": torch.tensor(True, device="cuda"), "shrink": torch.tensor(0.5, device="cuda")}
        plain, after = optim.adamw(plain, grad_output.float() * 0.5, plain_moments, **told)
        plain_moments = optim.Moments(after.first.to(moments), after.second.to(moments))
        right, right_moments = optim.adamw(right, grad_output.double() * 0.5, right_moments, **told)
        held = grad_output.clone()
        old = master.join(high, low) if halves else value.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            change = adamw.adamw_(
                high if halves else value, low if halves else None, first, second, held, **guards, **told
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        new = master.join(high, low) if halves else value
        torch.testing.assert_close(change, (new - old).norm(), rtol=1e-4, atol=0)
        assert not held.any()
    new = master.join(high, low) if halves else value
    error, plain_error = ((each.double() - right).norm() for each in (new, plain))
    assert error <= 1.5 * plain_error, (error, plain_error)


def test_adamw_beyond_32_bits() -> None:
    """The end of an arena of more than 2^31 elements moves as a short arena does."""
    size, tail = 2**31 + 4096, 4096
    high, low = (torch.zeros(size, device="cuda", dtype=each) for each in (torch.bfloat16, torch.int16))
    first, second, held = (torch.zeros(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    held[-tail:] = normal(tail)
    short = [each[-tail:].clone() for each in (high, low, first, second, held)]
    told: dict[str, Any] = {
        "allowed": torch.tensor(True, device="cuda"),
        "shrink": torch.tensor(1.0, device="cuda"),
        "updates": torch.tensor(3, device="cuda"),
        "lr": torch.tensor(1e-2, device="cuda", dtype=torch.float64),
        **{"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1},
    }
    norms = [adamw.global_norm([each]) for each in (held, short[4])]
    adamw.adamw_(high, low, first, second, held, **told)
    adamw.adamw_(*short, **told)
    for a, b in zip((high, low, first, second, held), short, strict=True):
        assert torch.equal(a[-tail:], b)
    torch.testing.assert_close(norms[0], norms[1])
    assert norms[0] > 0


def test_global_norm() -> None:
    gradients = [normal(1_000_003), normal(77, seed=1).float(), 1e3 * normal(40_000, seed=2)]
    right = torch.cat([each.double() for each in gradients]).norm()
    one, two = (adamw.global_norm(gradients) for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one.double(), right, rtol=1e-6, atol=0)
    gradients[0][999_999] = float("nan")
    assert not adamw.global_norm(gradients).isfinite()


@pytest.mark.parametrize("num_experts", [64, 160, 256])
def test_router(num_experts: int) -> None:
    """Scores and gradients against fp64; the chosen ones as by a stable sort, on scores with many ties.

    Tensor cores cut off what they add where an fp32 unit rounds: an error of 1e-6 in place of 2e-7 in a sum of 2048, of
    1e-5 in one of 4096. Factors rounded to bf16, or to tf32, would leave 1e-3.
    """
    x, w, grad_output = (
        normal(4096, 2048),
        truth.normal(2048, num_experts, seed=1, device="cuda") / 45,
        truth.normal(4096, num_experts, seed=2, device="cuda"),
    )
    found = graded(router.scores, [x, w], [grad_output])
    exact = graded(route.scores, [x, w], [grad_output], torch.float64)
    scores, dx, dw = (((a.double() - t).norm() / t.norm()).item() for a, t in zip(found, exact, strict=True))
    assert scores < 1e-6 and dw < 1e-5, (scores, dw)
    plain = graded(route.scores, [x, w], [grad_output])[1].double()
    assert dx < 1.05 * ((plain - exact[1]).norm() / exact[1].norm()).item()
    assert all(torch.equal(a, b) for a, b in zip(found, graded(router.scores, [x, w], [grad_output]), strict=True))
    scores = (50 * router.scores(x, w)).round()
    assert torch.equal(router.top_k(scores, 8), route.top_k(scores, 8))


@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 4), (160, 6), (256, 8)])
def test_what_is_told_of_a_router(num_experts: int, top_k: int) -> None:
    """Entropy, imbalance and its gradient against fp64; margins, and the parts of a gradient of scores, exactly."""
    score = torch.sigmoid(2 * truth.normal(3, 1000, num_experts, device="cuda"))
    bias = truth.normal(num_experts, seed=1, device="cuda") / 8
    flat = score.flatten(0, 1)
    favoured, expert = router.top_k(score, top_k), router.top_k(flat + bias, top_k)

    def told(which: Any) -> Callable[[Tensor], Any]:
        return lambda score: which.report(score, favoured, bias.to(score.dtype), expert, margins=False)[:2]

    compared(told(report), told(route), (score,), [torch.tensor(0.7, device="cuda")], factor=2, steps=4)
    found, wanted = (which.report(score, favoured, bias, expert, margins=True)[2] for which in (report, route))
    assert torch.equal(found, wanted)
    gradient = truth.normal(*flat.shape, seed=3, device="cuda")
    high, middle, low = router.split_bf16x3(gradient * flat * (1 - flat))
    narrow, wide = router.score_gradient(gradient, flat)
    assert torch.equal(narrow, torch.cat((high, high, middle), -1))
    assert torch.equal(wide, torch.cat((high, middle, low), -1))


@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 4), (160, 6), (256, 8)])
def test_a_route(num_experts: int, top_k: int) -> None:
    """Scores, weights and gradients against fp64 as near as through `scores`; the choices of its own scores exactly."""
    x, w = normal(3000, 768), truth.normal(768, num_experts, seed=1, device="cuda") / 28
    bias = truth.normal(num_experts, seed=2, device="cuda") / 8
    pulls = [
        truth.normal(3000, num_experts, seed=3, device="cuda") / 50,
        truth.normal(3000, top_k, seed=4, device="cuda"),
    ]
    told = router.route(x, w, bias, top_k=top_k, scale=2.5)
    assert torch.equal(told.routing.expert, route.top_k(told.score + bias, top_k))
    assert torch.equal(told.favoured, route.top_k(told.score, top_k))

    def through(which: Callable[..., Any], **how: Any) -> Callable[..., Any]:
        def run(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            routed = which(x, w, bias.to(w.dtype), top_k=top_k, scale=2.5, **how)
            return routed.score, routed.routing.weight

        return run

    # the choices of one and the same scores: near ties would go to other experts in fp64
    recorded = {"recorded": told.routing.expert}
    found, again = (graded(through(router.route), [x, w], pulls) for _ in range(2))
    plain = graded(through(route.route_tokens, score=router.scores, **recorded), [x, w], pulls)
    exact = graded(through(route.route_tokens, **recorded), [x, w], pulls, torch.float64)
    check(found, plain, exact, factor=1.5, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
