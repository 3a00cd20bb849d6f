"""From tokens to loss."""
