"""What a training will take: FLOPs, memory, traffic, time."""
