"""Checkpoints that are whole or absent: written by one trainer at a time, verified when they are read."""
