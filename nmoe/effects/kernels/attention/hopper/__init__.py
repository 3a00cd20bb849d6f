"""Backward pass of latent attention for Hopper: some warps load, others multiply.

Written in Gluon: Triton has no such kernels for sm_90. A program takes a block of 128 positions of one head; two groups
of four warps own 64 of them each, their products, softmax and sums, so that one's softmax lies behind the other's
products. Lengths are multiples of 128, formats bf16. Measured: docs/log.md, 2026-11-30.
"""

SIZES = (128, 64, 128)
"""Channels of a head: of its own key, of the rotated key, of its value."""

BLOCK = 128
"""Positions of a program."""
