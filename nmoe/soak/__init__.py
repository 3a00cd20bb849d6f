"""A training under faults: `nmoe soak`. Above the shell: it may import every room but cli."""
