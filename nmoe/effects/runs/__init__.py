"""What run folders tell: lists, trackers, the dashboard."""
