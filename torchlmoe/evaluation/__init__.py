"""Evaluates trained models: tasks of lm-eval, bits per byte of texts, recall tasks."""
