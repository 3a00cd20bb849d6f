"""Following run folders into other trackers."""
