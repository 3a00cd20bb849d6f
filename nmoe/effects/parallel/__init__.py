"""Several processes: starting and watching them, collectives, expert-parallel dispatch."""
