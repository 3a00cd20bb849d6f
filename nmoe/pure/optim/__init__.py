"""Update rules, clip, learning-rate schedule."""
