"""Memory of a layer of every kind of attention on a GPU from 4 k to 128 k tokens: as of tensors without values."""

from __future__ import annotations

import pytest
import torch

from tests import attention_layers as layers

pytestmark = [
    pytest.mark.gpu,
    # of torch's own thread of the backward pass, when a GEMM is the first thing that it does on the device
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]


@pytest.mark.parametrize("name", layers.LAYERS)
def test_memory_is_linear(name: str) -> None:
    """Forward and backward, printed by length with -s: bytes a token, and what is beside the slope."""
    device, section, slope = torch.device("cuda"), layers.LAYERS[name], layers.SLOPES[name]
    layers.both_ways(section, 256, device)()  # what libraries keep is there before the first measurement
    for length in layers.LENGTHS:
        run = layers.both_ways(section, length, device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = run()
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
        assert all(gradient.isfinite().all() for gradient in gradients)
        del gradients
        beside = taken - slope * length
        print(f"{name}, {length:,} tokens: {taken / length:,.0f} bytes a token, {beside / 2**20:,.1f} MiB beside it")
        # sorting takes memory of its own, and the allocator rounds up
        assert -0.05 * slope * length <= beside <= layers.WORKSPACE + 0.02 * slope * length
