"""One process and its GPU: which implementation runs, who owns memory, what the device says."""
