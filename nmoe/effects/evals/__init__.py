"""`nmoe eval`: a trained model is judged, offline, on the machine that is there."""
