"""Tasks of recall and state tracking: generated from a seed, read as training data and as evaluations."""
