"""How well a trained model does: tasks of lm-eval, bits per byte of texts."""
