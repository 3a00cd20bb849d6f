"""The section of number formats."""

from __future__ import annotations

from typing import Literal

import attrs

from nmoe.config.setting import setting


@attrs.frozen(kw_only=True)
class Precision:
    """Number formats."""

    compute: Literal["fp32", "bf16", "fp8", "mxfp8", "nvfp4"] = setting(
        "format of weights and activations; bf16 keeps an exact fp32 master; the others are bf16 but for the products "
        "of the experts, routed and shared",
        shapes=True,
    )
    moments: Literal["fp32", "bf16"] = setting(
        "format of the moments of what is stored in bf16", default="fp32", shapes=True
    )
    emulate: bool = setting(
        "whether products in fp8, mxfp8 or nvfp4 are computed in wider formats, with the same values, and slower",
        default=False,
        identity=False,
    )

    def storage(self) -> Literal["fp32", "bf16"]:
        """Format in which weights and activations are stored."""
        return "fp32" if self.compute == "fp32" else "bf16"

    def low(self) -> bool:
        """Whether the products of the experts are in fewer bits than what is stored."""
        return self.compute != self.storage()

    def kernels_fp8(self) -> bool:
        """Whether kernels multiply the experts in fp8."""
        return self.compute == "fp8" and not self.emulate
