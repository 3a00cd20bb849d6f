"""Attention's backward pass for Hopper: warps that load, warps that multiply. Written in Gluon, as Triton has no such kernels for sm_90."""
