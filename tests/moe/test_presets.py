"""The published routings against transformers' layers with converted weights: outputs and all gradients."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, KimiLinearConfig, MixtralConfig, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop import convert
from torchlmoe.interop.deepseek_v2 import moe_rules as deepseek_v2_rules
from torchlmoe.interop.kimi_linear import moe_rules as kimi_linear_rules
from torchlmoe.interop.mixtral import moe_rules as mixtral_rules
from torchlmoe.interop.qwen2_moe import moe_rules as qwen2_moe_rules
from torchlmoe.layers.sequence import SequenceLayout

DIM, EXPERT_DIM, NUM_EXPERTS, TOP_K, BATCH, LENGTH = 32, 16, 12, 4, 2, 50
COMMON = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "expert_dim": EXPERT_DIM}


def qwen2_moe(normalize):
    config = Qwen2MoeConfig(
        hidden_size=DIM,
        moe_intermediate_size=EXPERT_DIM,
        shared_expert_intermediate_size=24,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=normalize,
    )
    ours = {
        "score_function": "softmax",
        "normalize_top_k": normalize,
        "shared_expert_dim": 24,
        "shared_expert_gate": True,
    }
    return Qwen2MoeSparseMoeBlock(config), ours, qwen2_moe_rules()


def mixtral():
    config = MixtralConfig(
        hidden_size=DIM,
        intermediate_size=EXPERT_DIM,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        router_jitter_noise=0.0,
    )
    return MixtralSparseMoeBlock(config), {"score_function": "softmax", "normalize_top_k": True}, mixtral_rules()


def deepseek_v2(groups):
    config = DeepseekV2Config(
        hidden_size=DIM,
        moe_intermediate_size=EXPERT_DIM,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        n_shared_experts=2,
        n_group=groups,
        topk_group=min(groups, 2),
        topk_method="greedy" if groups == 1 else "group_limited_greedy",
        routed_scaling_factor=1.7,
    )
    ours = {
        "score_function": "softmax",
        "normalize_top_k": False,
        "num_shared_experts": 2,
        "routed_scaling_factor": 1.7,
    }
    ours |= {"num_expert_groups": groups, "num_limited_groups": min(groups, 2), "group_score": "max"}
    return DeepseekV2Moe(config), ours, deepseek_v2_rules()


def deepseek_v3(normalize):
    config = DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=EXPERT_DIM,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    ours = {
        "score_function": "sigmoid",
        "normalize_top_k": normalize,
        "num_shared_experts": 1,
        "routed_scaling_factor": 2.5,
    }
    ours |= {
        "num_expert_groups": 4,
        "num_limited_groups": 2,
        "group_score": "top2_sum",
        "balance": "loss_free",
    }
    return DeepseekV3MoE(config), ours, deepseek_v2_rules(loss_free=True)


def kimi_linear():
    config = KimiLinearConfig(
        hidden_size=DIM,
        moe_intermediate_size=EXPERT_DIM,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
    )
    ours = {
        "score_function": "sigmoid",
        "normalize_top_k": True,
        "num_shared_experts": 1,
        "routed_scaling_factor": 2.446,
        "balance": "loss_free",
    }
    return KimiLinearMoE(config), ours, kimi_linear_rules()


PRESETS = {
    "qwen2_moe": lambda: qwen2_moe(False),
    "qwen2_moe_normalized": lambda: qwen2_moe(True),
    "mixtral": mixtral,
    "deepseek_v2_greedy": lambda: deepseek_v2(1),
    "deepseek_v2_group_limited": lambda: deepseek_v2(4),
    "deepseek_v3": lambda: deepseek_v3(True),
    "deepseek_v3_not_normalized": lambda: deepseek_v3(False),
    "kimi_linear": kimi_linear,
}


def gradients(layer):
    """By the names of the state dict; zero for a buffer."""
    found = {name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()}
    return found | {name: parameter.grad for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_transformers(preset):
    generator = torch.Generator().manual_seed(0)
    theirs, options, table = PRESETS[preset]()
    balance = options.pop("balance", "none")
    ours = MoE(DIM, **COMMON, **options, balance=balance)
    with torch.no_grad():
        for name, parameter in (*theirs.named_parameters(), *theirs.named_buffers()):
            std = 0.1 if "bias" in name else 1.0 if name == "gate.weight" else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    ours.load_state_dict(convert(theirs.state_dict(), table))

    # Some of them route in float32 whatever the model's dtype, so this is the dtype that both speak.
    x = torch.randn(BATCH, LENGTH, DIM, generator=generator)
    grad = torch.randn(BATCH, LENGTH, DIM, generator=generator)
    results = []
    for layer, options in ((ours, {"sequence": SequenceLayout.of_rows(BATCH, LENGTH)}), (theirs, {})):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, **options)
        y.backward(grad)
        results.append(({"y": y, "x": leaf.grad}, gradients(layer)))
    (found, found_gradients), (expected, expected_gradients) = results
    found, expected = found | found_gradients, expected | convert(expected_gradients, table)
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= 2e-6 * expected[name].norm(), name

    gate = theirs.gate(x.flatten(0, 1))
    routing = ours.router(x.flatten(0, 1))
    assert torch.equal(routing.expert_TK.sort(-1).values, gate[2].sort(-1).values)
