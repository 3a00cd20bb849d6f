"""Global norm of the gradients, and the clip to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, accumulated in at least fp32 whatever their format."""
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for gradient in gradients
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """Factor that brings gradients of global norm `norm` to at most `limit` (as `clip_grad_norm_`, 1e-6 included)."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)
