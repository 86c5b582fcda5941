"""Kernels run in Triton's interpreter where there is no GPU, and everywhere on memory that is full of NaN."""

import importlib
import pkgutil
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

import torchlmoe.kernels

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is decorated, that is when its file is imported
        for file in pkgutil.iter_modules(torchlmoe.kernels.__path__):
            importlib.import_module(f"torchlmoe.kernels.{file.name}")


@pytest.fixture(autouse=True)
def interpreter_where_there_is_no_gpu(monkeypatch):
    """In these tests only: elsewhere backend = "triton" is refused on a CPU."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
def half(request) -> torch.dtype:
    """A dtype of 16 bits. The interpreter computes wrongly in bfloat16."""
    return request.param


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """Memory is filled with NaN (integers: their largest value), so that elements that no kernel wrote are found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def with_faster_interpreter():
    with faster_interpreter() if INTERPRETED else nullcontext():
        yield


@contextmanager
def faster_interpreter():
    """Triton's interpreter with less to do for the same: it scans one element after another in Python, here one slice
    after another in the same order; and it prepares the language again at every call of a device function."""
    from triton.runtime.interpreter import InterpretedFunction, ScanOps, _patch_lang

    prepared = set()

    def generic_scan(self, inputs):
        arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        dtypes = [x.dtype for x in inputs]
        rows = [tuple(self.to_tensor(x[0], dtype) for x, dtype in zip(arrays, dtypes, strict=True))]
        for index in range(1, len(arrays[0])):
            row = (self.to_tensor(x[index], dtype) for x, dtype in zip(arrays, dtypes, strict=True))
            combined = self.combine_fn.fn(*rows[-1], *row)
            rows.append(combined if isinstance(combined, tuple) else (combined,))
        stacks = (np.stack([x.handle.data for x in column], self.axis) for column in zip(*rows, strict=True))
        return [self.to_tensor(x, dtype) for x, dtype in zip(stacks, dtypes, strict=True)]

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in prepared:
            _patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScanOps, "generic_scan", generic_scan)
        patch.setattr(InterpretedFunction, "__call__", call)
        yield
