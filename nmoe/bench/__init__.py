"""Measurements a user runs: `nmoe bench`. Above the shell: it may import every room but cli."""
