"""Muon against its definition: singular values, which weights it moves, experts one by one, fused layers apart."""

import pytest
import torch

from torchlmoe.config.load import load_config
from torchlmoe.config.settings import Optimizer
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.optim.muon import Muon, orthogonalize
from torchlmoe.parallel.precision import compute_in
from torchlmoe.training.optimizer import build_optimizer


def newton_schulz(x):
    """One matrix, as in the definition."""
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-2)])
def test_singular_values_go_to_one_and_directions_stay(dtype, tolerance):
    # Products in bfloat16 round by 0.4%, five times over.
    x = torch.randn(3, 8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    along = u.mT @ orthogonalize(x.to(dtype)).double() @ v.mT  # diagonal, if x's singular vectors are kept
    values = along.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (along - values.diag_embed()).abs().max() < tolerance


def test_a_step_is_the_definition_matrix_by_matrix():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    single, experts, vector = randn(12, 5), randn(3, 8, 6), randn(7)
    parameters = [torch.nn.Parameter(x.clone()) for x in (single, experts, vector)]
    groups = [
        {"params": [parameters[0]], "fused_rows": 1, "weight_decay": 0.1},
        {"params": [parameters[1]], "fused_rows": 2, "weight_decay": 0.0},
        {"params": [parameters[2]], "weight_decay": 0.1},
    ]
    optimizer = Muon(groups, lr=0.1, momentum=0.9)
    twin = torch.nn.Parameter(vector.clone())
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.1)
    momentum = [torch.zeros_like(single), torch.zeros_like(experts)]
    expected = [single.clone(), experts.clone()]
    for _ in range(3):
        gradients = [randn(*parameter.shape) for parameter in parameters]
        for parameter, gradient in zip((*parameters, twin), (*gradients, gradients[2]), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        adamw.step()
        for index in (0, 1):
            momentum[index] = 0.9 * momentum[index] + 0.1 * gradients[index]
        update = [0.1 * gradients[index] + 0.9 * momentum[index] for index in (0, 1)]
        expected[0] = expected[0] * (1 - 0.1 * 0.1) - 0.1 * 0.2 * 12**0.5 * newton_schulz(update[0].T).T
        for expert in range(3):
            for rows in (slice(0, 4), slice(4, 8)):
                step = 0.1 * 0.2 * 6**0.5 * newton_schulz(update[1][expert, rows])
                expected[1][expert, rows] -= step
    torch.testing.assert_close(parameters[0].data, expected[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(parameters[1].data, expected[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(parameters[2].data, twin.data)


def test_matrices_of_the_blocks_take_it_and_nothing_else_does():
    model = build_on_meta(load_config(["--model.dim", "32", "--model.num_heads", "2"]), 50).to_empty(device="cpu")
    model.init_weights(0)
    compute_in(torch.bfloat16, model)  # attributes are casts now
    optimizer = build_optimizer(model, Optimizer(name="muon", matrix_lr=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    group_of = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert group_of.keys() == set(names.values())
    moved = {name for name, group in group_of.items() if group["fused_rows"] is not None}
    assert {name.split(".", 2)[2] for name in moved if name.startswith("blocks.0.")} == {
        *(f"mixer.{layer}_proj.weight" for layer in ("q", "k", "v", "a", "b", "gate", "o")),
        "feed_forward.experts.gate_up_proj",
        "feed_forward.experts.down_proj",
    }
    assert not {name for name in moved if not name.startswith("blocks.")}
    assert {group_of[name]["lr"] for name in moved} == {0.5}
    assert group_of["blocks.0.feed_forward.experts.gate_up_proj"]["fused_rows"] == 2
