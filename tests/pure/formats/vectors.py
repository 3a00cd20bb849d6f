"""Codes and scales of torchao, with the inputs they are of: what `torchao.json` holds and how it was made.

torchao's functions are prototypes that move from release to release, so tests read what one release made:
`pip install torchao==0.18.0 && python -m tests.pure.formats.vectors > tests/pure/formats/torchao.json`
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor


def digest(x: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def uniform(rows: int, columns: int) -> Tensor:
    """Multiples of 2**-23 in [-1, 1) from a multiplicative congruence: the same with every release of torch."""
    word = 12345
    values: list[float] = []
    for _ in range(rows * columns):
        word = word * 48271 % 2147483647
        values.append((word >> 7) * 2.0**-23 - 1.0)
    return torch.tensor(values).view(rows, columns)


def inputs() -> dict[str, Tensor]:
    """Matrices [R 256] f32 by name: what each is hard for."""
    plain = uniform(128, 256)
    code = torch.arange(256, dtype=torch.uint8)[torch.arange(256) & 127 != 127].view(torch.float8_e4m3fn).float()
    middle = code.sort().values.unfold(0, 2, 1).mean(1)
    wide = plain[:32] * torch.exp2(torch.arange(32 * 256) * 1009 % 160 - 80.0).view(32, 256)
    ends = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 6.1e-5, 2.0**-9, 2.0**-10, 3e38, -3.4e38, 447.9, 448.0, 464.0, 480.0])
    e2m1 = torch.arange(-24, 25) / 4.0
    # of blocks of 32: the smallest scale of MXFP8 is 2**-127, and its numbers up to 448 of that
    faint = torch.tensor([0.01, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0])[:, None] * torch.arange(1, 33) / 32
    return {
        "plain": plain,
        "cubed": plain**3,
        "bf16": (plain * 3).bfloat16().float(),
        "wide": wide,
        "codes of e4m3": _filled(code, 2),
        "ties of e4m3": torch.cat((_filled(middle, 1), torch.tensor([448.0]).expand(1, 256))).T.reshape(2, 256),
        "ties of e2m1": _filled(e2m1, 2),
        "ends of fp32": _filled(ends[2:], 8),
        "zeros": torch.zeros(2, 256),
        "beside the smallest scale": (faint * 448 * 2.0**-127).view(1, 256).repeat(2, 1),
        "powers of two": _filled(torch.exp2(torch.arange(-100.0, 100.0)), 8),
        "just above powers of two": _filled(torch.exp2(torch.arange(-90.0, 90.0)) * 448 * (1 + 2.0**-20), 8),
    }


def _filled(values: Tensor, rows: int) -> Tensor:
    """Values repeated, each row turned by another number."""
    whole = values.repeat(-(-256 * rows // len(values)))[: 256 * rows].view(rows, 256)
    return torch.stack([row.roll(37 * place) for place, row in enumerate(whole)])


def theirs(x: Tensor) -> dict[str, Tensor]:
    """What torchao makes of a matrix, by format."""
    from torchao.prototype.blockwise_fp8_training import kernels  # pyright: ignore[reportMissingImports]
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx  # pyright: ignore[reportMissingImports]
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale  # pyright: ignore[reportMissingImports]

    row, row_scale = kernels.torch_blockwise_scale_act_quant_lhs(x)
    exponent, mx = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    factor = per_tensor_amax_to_scale(x.abs().amax())
    scale, packed = nvfp4_quantize(x, 16, factor)
    made = {
        "e4m3 codes": row,
        "e4m3 scales": row_scale,
        "mxfp8 codes": mx,
        "mxfp8 exponents": exponent,
        "nvfp4 codes": packed,
        "nvfp4 scales": scale,
        "nvfp4 factor": factor.view(1),
    }
    if len(x) % 128 == 0:
        made["e4m3 weight codes"], made["e4m3 weight scales"] = kernels.torch_blockwise_scale_weight_quant(x)
    return made


SIGNS = (1, -1, -1, 1, 1, 1, -1, 1, -1, -1, -1, 1, -1, 1, 1, -1)
"""Of a rotation."""


def main() -> None:
    """Write the digests."""
    from importlib.metadata import version

    from torchao.prototype.moe_training.nvfp4_training.hadamard_utils import get_rht_matrix  # pyright: ignore[reportMissingImports]

    made = {name: {part: digest(y) for part, y in theirs(x).items()} for name, x in inputs().items()}
    rotation = digest(get_rht_matrix(SIGNS, "cpu", torch.float32, len(SIGNS)))
    print(json.dumps({"torchao": version("torchao"), "digests": made, "rotation": rotation}, indent=1))


if __name__ == "__main__":
    main()
