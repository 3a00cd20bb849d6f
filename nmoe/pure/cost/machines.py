"""What GPUs and the links between them can do: constants with their sources, and the time of a message.

Alpha-beta model: a message of n bytes takes alpha + n / beta. Beta counts bytes on the wire, of one GPU, in one
direction, while the other direction is as busy.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import attrs


@attrs.frozen(kw_only=True)
class Link:
    """One way from a GPU to another."""

    alpha_s: float  # what even an empty message takes
    bytes_per_s: float
    source: str  # where both numbers come from

    def seconds(self, num_bytes: float) -> float:
        """Of one message; nothing to send takes no time."""
        return self.alpha_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


@attrs.frozen(kw_only=True)
class Machine:
    """Hosts of GPUs of one kind."""

    gpu: str
    memory: float  # bytes of one GPU
    peak_flops: float  # dense bf16 FLOP/s of one GPU, the unit of MFU
    mfu: float  # that one GPU reaches with a model of its own, computation alone
    gpus_per_host: int  # where nothing else is said
    push: Link  # rows written into the memory of a GPU of the same host
    collective: Link  # NCCL inside a host
    network: Link  # between hosts, whoever sends


PEAK_FLOPS: Mapping[tuple[int, int], float] = MappingProxyType({(9, 0): 989.5e12, (10, 0): 2250e12})
"""Dense bf16 FLOP/s by compute capability, the unit of MFU: H100 and H200, B200 (NVIDIA's data sheets, without
sparsity). The kernels are written for these capabilities and no others."""

H200 = Machine(
    gpu="H200",
    memory=141e9,
    peak_flops=PEAK_FLOPS[9, 0],
    mfu=0.50,  # measured: 49.9 % with configs/moonlet.toml, natural routing, docs/log.md, 2026-11-24
    gpus_per_host=8,
    # Rows of 4 KiB with their barrier, replayed from a CUDA graph, both ways at once: 4,096 take 54 to 57 us, 16,384
    # 196 to 201
    push=Link(alpha_s=7.5e-6, bytes_per_s=350e9, source="measured, docs/log.md, two H200, 2026-11-30"),
    # NCCL's all-to-all, 244 to 257 GB/s; its start-up time was not measured
    collective=Link(
        alpha_s=20e-6, bytes_per_s=250e9, source="rate measured by a probe, docs/log.md, two H200, 2026-11-23"
    ),
    # One port of 400 Gbit/s a GPU at 90 %. NVSHMEM without GPU-initiated sends goes through a thread of the host:
    # 300 to 500 us for a dispatch of few tokens by published figures of others, 60 to 100 with GPU-initiated ones
    network=Link(alpha_s=400e-6, bytes_per_s=45e9, source="assumed: 90 % of 400 Gbit/s a GPU, sends by the host"),
)

H100 = attrs.evolve(H200, gpu="H100", memory=80e9, mfu=0.46)
"""The same chip and NVLink as the H200, with less and slower memory; 45.8 % measured with six layers of moonlet, its
links not."""

MACHINES: Mapping[str, Machine] = MappingProxyType({"h100": H100, "h200": H200})
"""By the name a user gives."""
