"""Number formats: how values are stored in fewer bits, and what restores them."""
