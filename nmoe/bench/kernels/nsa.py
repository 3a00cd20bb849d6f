"""Native sparse attention, branch by branch and whole, beside dense attention with as many heads of the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import attrs
import torch
from torch import Tensor

from nmoe.bench.kernels.meter import Variant, draw, relative_error
from nmoe.effects.kernels.attention import mla, nsa
from nmoe.pure.model.attention.gqa import attended
from nmoe.pure.model.attention.nsa import attend_selected, first_tokens
from nmoe.pure.model.attention.nsa_cost import attended_compressed, attended_selected

PEER = "dense MLA"

CHECKED = 64
"""Last queries of the selected branch whose output and gradient are compared with fp64."""


@attrs.frozen(kw_only=True)
class Case:
    """Sizes; blocks and window are those of the paper."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value: int
    block: int
    stride: int
    selected_block: int
    selected: int
    window: int

    def flop(self) -> float:
        """Forward and backward over attended pairs of three branches: two products and five; scores count once."""
        pairs = (
            attended_compressed(self.length, self.block, self.stride)
            + attended_selected(self.length, self.selected_block, self.selected)
            + attended(self.length, self.window)
        )
        return 2.0 * self.batch * self.heads * pairs * (4 * self.head_dim + 3 * self.value)

    def moved_bytes(self) -> float:
        """Queries and three outputs, and each's gradient: forward reads and writes, backward too."""
        return 2.0 * self.batch * self.length * self.heads * 3 * (self.head_dim + 3 * self.value)


CASES = tuple(
    Case(
        **{"batch": 1, "length": length, "heads": 64, "kv_heads": 4, "head_dim": 192, "value": 128},
        **{"block": 32, "stride": 16, "selected_block": 64, "selected": 16, "window": 512},
    )
    for length in (16384, 32768)
)


def variants(case: Case, device: torch.device, tiles: nsa.Tiles, dense: mla.Tiles) -> Iterator[Variant]:
    """Each branch, all three, and dense attention; neither projections nor the making of compressed keys."""
    shape, scale = (case.batch, case.length), case.head_dim**-0.5
    q = draw(device, *shape, case.heads, case.head_dim, name="q")
    keys, values = (
        draw(device, *shape, 2, case.kv_heads, width, name=name).detach()
        for width, name in ((case.head_dim, "k"), (case.value, "v"))
    )
    first = first_tokens(case.length, (), block=case.block, stride=case.stride, device=device)
    pooled = (case.batch, first.shape[1], case.kv_heads)
    k_pooled, v_pooled = draw(device, *pooled, case.head_dim, name="ck"), draw(device, *pooled, case.value, name="cv")
    k_selected, k_window = (keys[:, :, place].requires_grad_() for place in range(2))
    v_selected, v_window = (values[:, :, place].requires_grad_() for place in range(2))
    grad_output = draw(device, *shape, case.heads, case.value, name="grad_output").detach()

    compress = partial(
        nsa.compressed,
        scale=scale,
        block=case.block,
        stride=case.stride,
        selected_block=case.selected_block,
        num_selected=case.selected,
        tiles=tiles,
    )
    select = partial(nsa.selected, scale=scale, block=case.selected_block, tiles=tiles)
    near = partial(nsa.window, scale=scale, window=case.window, tiles=tiles)
    with torch.no_grad():
        chosen = compress(q, k_pooled, v_pooled, first)[1]

    def whole() -> Tensor:
        o, blocks = compress(q, k_pooled, v_pooled, first)
        return o + select(q, k_selected, v_selected, blocks) + near(q, k_window, v_window)

    given: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "compressed and selection": (lambda: compress(q, k_pooled, v_pooled, first)[0], (q, k_pooled, v_pooled)),
        "selected": (lambda: select(q, k_selected, v_selected, chosen), (q, k_selected, v_selected)),
        "window": (lambda: near(q, k_window, v_window), (q, k_window, v_window)),
        "ours": (whole, (q, k_pooled, v_pooled, k_selected, v_selected, k_window, v_window)),
    }
    if device.type == "cuda":
        kv = draw(device, *shape, case.heads, 2 * case.value, name="dense_kv")
        k_rope = draw(device, *shape, case.head_dim - case.value, name="dense_k")
        attend = partial(mla.mla_attention, scale=scale, forward="cudnn", tiles=dense)
        given[PEER] = (lambda: attend(q, kv, k_rope), (q, kv, k_rope))
    for name, (apply, leaves) in given.items():

        def forward(apply: Callable[[], Tensor] = apply) -> Tensor:
            with torch.no_grad():
                return apply()

        def both(apply: Callable[[], Tensor] = apply, leaves: tuple[Tensor, ...] = leaves) -> tuple[Tensor, ...]:
            o = apply()
            return o.detach(), *torch.autograd.grad(o, leaves, grad_output)

        checked = partial(error, case, both, chosen, scale, grad_output, leaves) if name == "selected" else None
        yield Variant(name=name, forward=forward, both=both, error=checked)


def error(
    case: Case,
    both: Callable[[], tuple[Tensor, ...]],
    chosen: Tensor,
    scale: float,
    grad_output: Tensor,
    leaves: tuple[Tensor, ...],
) -> float:
    """Of the selected branch's last queries: output and gradient of the query beside fp64."""
    before = max(0, case.length - CHECKED)
    q, k, v = (tensor[:1].detach().double() for tensor in leaves)
    own = q[:, before:].requires_grad_()
    y = attend_selected(own, k, v, chosen[:1, before:], scale=scale, block=case.selected_block, before=before)
    (right,) = torch.autograd.grad(y, own, grad_output[:1, before:].double())
    o, dq, *_ = both()
    return relative_error([o[:1, before:], dq[:1, before:]], [y.detach(), right])
