"""Hosts that have tokenized each for themselves compare what they have."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_on_ranks
from torchlmoe.data.order import Source
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.training.data import check_same_data


def store(content):
    return SimpleNamespace(index=SimpleNamespace(content=content * 64))


def compare_on_rank():
    start_process_group(torch.device("cpu"))
    rank = dist.get_rank()
    check_same_data([Source(store("a"))], store("b"))
    check_same_data([Source(store("a"))], None)
    with pytest.raises(
        ValueError,
        match=r"The training data differs between hosts: sha256 a{16} on ranks 0, 2, sha256 c{16} on rank 1; give all",
    ):
        check_same_data([Source(store("c" if rank == 1 else "a"))], store("b"))
    with pytest.raises(
        ValueError, match=r"The validation data differs .*: sha256 0{16} on rank 0, sha256 1{16} on rank 1,"
    ):
        check_same_data([Source(store("a"))], store(str(rank)))
    with pytest.raises(ValueError, match=r"The data of 'web' differs between hosts: .* on rank 0, .* on ranks 1, 2;"):
        check_same_data([Source(store("a"), 1, "code"), Source(store("d" if rank else "e"), 2, "web")], None)


def test_ranks_compare_their_stores():
    run_on_ranks(3, compare_on_rank)
