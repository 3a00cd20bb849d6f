"""Optimizer passes over flat arenas."""
