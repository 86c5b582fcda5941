"""Tasks of recall and state tracking, generated from a seed, for training and for evaluation."""
