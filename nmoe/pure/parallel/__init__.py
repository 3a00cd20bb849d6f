"""Who sends what where."""
