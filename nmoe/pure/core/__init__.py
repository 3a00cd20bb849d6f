"""What a parameter is and where it lies."""
