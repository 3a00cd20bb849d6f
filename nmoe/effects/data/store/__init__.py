"""Token shards on disk: formats, readers, writers."""
