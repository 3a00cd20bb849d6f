"""Text files to documents to token shards."""
