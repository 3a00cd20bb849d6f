"""Attention's products for Hopper: some warps load, others multiply. Written in Gluon, as the mixture's are."""
