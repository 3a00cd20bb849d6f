"""What run folders hold: lists, trackers, the dashboard."""
