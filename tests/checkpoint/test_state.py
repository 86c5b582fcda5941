"""The state of any torch optimizer, through a folder and back; and a step after it equals the uninterrupted one."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from torchlmoe.checkpoint.folders import published
from torchlmoe.checkpoint.state import OptimizerState, load_tensors, model_state, saved_tensors
from torchlmoe.checkpoint.writer import CheckpointWriter

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5, fused=True),
    "adamw_amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "muon": lambda parameters: torch.optim.Muon(parameters, lr=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}


def build(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False))
    optimizer = OPTIMIZERS[name](model.parameters())
    return model, optimizer, OptimizerState(model, optimizer)


def step(model, optimizer, seed):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_round_trip(name, tmp_path):
    model, optimizer, state = build(name)
    for seed in range(3):
        step(model, optimizer, seed)
    tensors = model_state(model) | state.tensors()
    dcp.save(tensors, storage_writer=CheckpointWriter(tmp_path, 3, {}, keep_latest_k=1), no_dist=True)
    expected = {key: tensor.clone() for key, tensor in tensors.items()}

    other, other_optimizer, other_state = build(name)
    before = {key: tensor.clone() for key, tensor in model_state(other).items()}
    other_state.create()
    torch.testing.assert_close(model_state(other), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in other.parameters())
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.1]
    loaded = model_state(other) | other_state.tensors()
    load_tensors(loaded, published(tmp_path)[3])
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)

    step(model, optimizer, 4)
    step(other, other_optimizer, 4)
    torch.testing.assert_close(model_state(other), model_state(model), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parameters_without_a_saved_state_start_afresh(tmp_path):
    model, _, state = build("adamw")
    state.create()
    tensors = {name: tensor for name, tensor in state.tensors().items() if name.endswith("0.weight")}
    dcp.save(tensors, storage_writer=CheckpointWriter(tmp_path, 1, {}, keep_latest_k=1), no_dist=True)
    saved = saved_tensors(published(tmp_path)[1])
    state.forget_all_but(set(saved))
    assert state.tensors().keys() == saved.keys() == tensors.keys()
    with pytest.raises(ValueError, match=r"has no tensor 'model\.0\.weight'"):
        load_tensors(model_state(model), published(tmp_path)[1])


def test_what_is_no_tensor_is_refused():
    _, optimizer, state = build("sgd")
    state.create()
    next(iter(optimizer.state.values()))["age"] = 3
    with pytest.raises(ValueError, match=r"optimizer\.age\.0\.weight = 3 cannot be saved"):
        state.tensors()
