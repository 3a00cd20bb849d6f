"""Every kernel that ships, at the sizes it ships with, as requests to compile ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from nmoe.effects.kernels import loss as loss_kernels
from nmoe.effects.kernels import norm as norm_kernels
from nmoe.effects.kernels.moe import router, swiglu
from nmoe.effects.kernels.optim import adamw
from tests.kernels.aot import Request

KERNELS = "nmoe.effects.kernels"


def request(kernel: str, signature: str, tile: Any, constants: Mapping[str, object], sizes: str = "") -> Request:
    """signature: "name:type name:type"; sizes: integers that are multiples of 16."""
    types = dict(each.split(":") for each in signature.split())
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    return Request(
        kernel=f"{KERNELS}.{kernel}",
        signature=types,
        constants=constants,
        aligned=[*pointers, *sizes.split()],
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def loss(wants_gradient: bool) -> Request:
    """A vocabulary of 201,088."""
    tile = loss_kernels.TILE
    return request(
        "loss:cross_entropy_kernel",
        "logits:*bf16 target:*i64 losses:*fp32 stride:i32 losses_stride:i32 vocabulary:i32 scale:fp32 z_loss:fp32",
        tile,
        {"wants_gradient": wants_gradient, "block": tile.block_n},
        "stride losses_stride vocabulary",
    )


def norm(name: str, adds: bool, width: int) -> Request:
    """Rows of a width that is a multiple of 16."""
    tile = norm_kernels.TILE
    if name == "forward":
        signature = (
            "x:*bf16 y:*bf16 gain:*fp32 total:*bf16 normed:*bf16 rstd:*fp32 rows:i32 width:i32 x_stride:i32 "
            "y_stride:i32 eps:fp32"
        )
    else:
        signature = (
            "x:*bf16 gain:*fp32 rstd:*fp32 grad_output:*bf16 residual:*bf16 gradient:*bf16 partial:*fp32 "
            "rows:i32 width:i32 x_stride:i32"
        )
    sizes = "rows width x_stride" + (" y_stride" if name == "forward" else "")
    block = 1 << (width - 1).bit_length()
    tile = attrs.evolve(tile, num_warps=norm_kernels.warps(width, tile))
    return request(f"norm:{name}_kernel", signature, tile, {"adds": adds, "m": tile.block_m, "block": block}, sizes)


def gate(name: str) -> Request:
    """The activation, forward or backward."""
    tile = swiglu.TILE
    arrays = "x:*bf16 y:*bf16" if name == "forward" else "x:*bf16 grad_output:*bf16 gradient:*bf16"
    constants = {"block_m": tile.block_m, "block_n": tile.block_n}
    return request(f"moe.swiglu:{name}_kernel", f"{arrays} rows:i32 width:i32", tile, constants, "rows width")


def update(value: str, gradient: str, moments: str, size: str = "i32") -> Request:
    """AdamW on an arena of these formats."""
    tile = adamw.TILE
    bits = "*fp32" if value == "fp32" else "*i16"
    return request(
        "optim.adamw:update_kernel",
        f"value:{bits} remainder:{bits} first:*{moments} second:*{moments} gradient:*{gradient} partial:*fp32 "
        f"allowed:*i8 shrink:*fp32 updates:*i64 lr:*fp64 size:{size}",
        tile,
        {
            **{"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1},
            **{"has_remainder": value == "bf16", "block": tile.block, "repeats": tile.repeats},
        },
        "size",
    )


def square_sum(gradient: str) -> Request:
    """The norm of an arena."""
    tile = adamw.NORM_TILE
    return request(
        "optim.adamw:norm_kernel",
        f"x:*{gradient} partial:*fp32 size:i32",
        tile,
        {"block": tile.block, "repeats": tile.repeats},
        "size",
    )


def choice(num_experts: int, top_k: int) -> Request:
    """The chosen experts of each token."""
    tile = router.TILE
    padded = 1 << (num_experts - 1).bit_length()
    return request(
        "moe.router:top_k_kernel",
        "x:*fp32 out:*i64 rows:i32 E:i32",
        tile,
        {"M": tile.block_m, "EP": padded, "K": top_k},
        "rows E",
    )
