"""From text to token shards: the embedded corpus, its tokenizer, and the folder format they are kept in."""
