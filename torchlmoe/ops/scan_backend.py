"""The backends of operations that are scanned step by step."""


def check_backend(backend: str, operation: str = "elementwise_recurrence") -> None:
    """Raises ValueError for a backend that the operation does not have."""
    others = ("triton", "reference") if operation == "elementwise_recurrence" else ("reference",)
    if backend not in ("auto", "chunked", *others):
        served = "', '".join(("auto", "chunked", *others[:-1]))
        raise ValueError(f"backend = {backend!r} is not supported by {operation}; use '{served}' or 'reference'.")
