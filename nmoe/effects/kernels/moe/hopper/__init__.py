"""The products of the routed experts for Hopper, in bf16 and fp8: some warps load, others multiply and store.

Programs stay and take one tile after another, so that the next tile's operands come while one is stored. Written in
Gluon: Triton has no such kernels for sm_90. Letters, shapes and bits are those of `experts` and `fp8`; measured:
docs/log.md, 2026-11-30.
"""
