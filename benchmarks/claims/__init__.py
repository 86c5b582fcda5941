"""Claims of the paper, checked on a small scale: see `__main__.py`."""
