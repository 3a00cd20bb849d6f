"""Rotary position embedding and its range extension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nmoe.config.sections import Yarn
from nmoe.pure.core.shape import expect_shape
from nmoe.pure.core.tree import record
from nmoe.pure.model.norm import upcast


@record
class Rope:
    """Rotation table: cosine and sine of every position and frequency."""

    cos: Tensor  # [T P/2] f32
    sin: Tensor  # [T P/2] f32


def magnitude(factor: float, mscale: float) -> float:
    """YaRN's correction of the attention's magnitude for an extension by `factor` (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(dim: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Radians a position of each channel pair, [dim/2] f64.

    With YaRN, pairs that turn often within the original range keep their frequency, slow ones are divided by the
    factor, and a linear ramp joins them.
    """
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if yarn is None:
        return frequency

    def pair(rotations: float) -> float:
        """Index of the pair that makes this many turns over the original range."""
        return dim * math.log(yarn.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    begin, end = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        begin, end = math.floor(begin), math.ceil(end)
    low, high = max(begin, 0), min(end, dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / yarn.factor * ramp


def table(num_positions: int, dim: int, *, theta: float, yarn: Yarn | None) -> Rope:
    """The rotation table, computed in fp64 and rounded once to fp32.

    num_positions  positions served
    dim            rotated channels a head, even
    Raises:        ValueError for an odd number of channels.
    Source:        Su et al. (arXiv:2104.09864) eq. 15; YaRN (arXiv:2309.00071) eq. 17-23.
    """
    if dim % 2:
        raise ValueError(f"table: expected an even number of rotated channels, got {dim}; channels turn in pairs")
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies(dim, theta, yarn))
    scale = 1.0 if yarn is None else magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
    return Rope((angle.cos() * scale).float(), (angle.sin() * scale).float())


@record
class Documents:
    """Where the document of each token is; made once a batch, read by every layer."""

    start: Tensor  # [B T] i32, index in the row of the document's first token
    position: Tensor  # [B T] i32, position of the token in its document


def documents(start: Tensor | tuple[()]) -> Documents | tuple[()]:
    """The documents of a batch from the index in its row of each one's first token; () for whole rows."""
    if not isinstance(start, Tensor):
        return ()
    return Documents(start, torch.arange(start.shape[1], dtype=start.dtype, device=start.device) - start)


def rotate(x: Tensor, rope: Rope, positions: Tensor | tuple[()] = ()) -> Tensor:
    """`x` with neighbouring channels (2i, 2i+1) turned by the angle of their position.

    x          [B T ... P]
    positions  [B T]         of each token, within the table; (): 0..T-1
    returns    [B T ... P]   in the format of `x`
    Raises:    ValueError for other channels than the table's, positions of another shape, or, where they are not given,
               a row that is longer than the table. Positions themselves are not read: a device would be waited for.
    """
    wanted = (rope.cos.shape[0], x.shape[-1] // 2)
    expect_shape("rotate: expected a table", rope.cos.shape, wanted, "pass the table of these channels, half as wide")
    if isinstance(positions, Tensor):
        expect_shape("rotate: expected positions", positions.shape, x.shape[:2], "pass the position of each token")
    if not isinstance(positions, Tensor) and x.shape[1] > rope.cos.shape[0]:
        raise ValueError(
            f"rotate: expected at most the {rope.cos.shape[0]} positions of the table, got {x.shape[1]}; make the "
            "environment for longer sequences"
        )
    at, rows = (positions, len(positions)) if isinstance(positions, Tensor) else (slice(x.shape[1]), 1)
    shape = (rows, x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1] // 2)
    cos, sin = rope.cos[at].view(shape), rope.sin[at].view(shape)
    even, odd = upcast(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
