"""If kernels cannot run, one message says why."""

import logging

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchlmoe.ops import kernel_backend


def test_auto_says_once_why_tensors_of_two_devices_run_in_plain_pytorch(caplog):
    kernel_backend._say_once.cache_clear()
    with FakeTensorMode(), caplog.at_level(logging.WARNING, logger="torchlmoe"):
        there, here = torch.empty(1, device="cuda"), torch.empty(1, dtype=torch.int32)
        for _ in range(2):
            assert not kernel_backend.kernels_serve("auto", there, None, here)
        assert not kernel_backend.kernels_serve("auto", here)  # on a CPU there is nothing to say
    assert [record.message for record in caplog.records] == [
        "Plain PyTorch runs instead of Triton kernels, since some of its tensors are on a GPU and some are not."
    ]
