"""The published routings against transformers' layers with the same weights: outputs and all gradients."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from torchlmoe.feed_forwards.moe import MoE
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
    return Qwen2MoeSparseMoeBlock(config), ours


def mixtral():
    config = MixtralConfig(
        hidden_size=DIM,
        intermediate_size=EXPERT_DIM,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        router_jitter_noise=0.0,
    )
    return MixtralSparseMoeBlock(config), {"score_function": "softmax", "normalize_top_k": True}


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
    return DeepseekV2Moe(config), ours


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
    return DeepseekV3MoE(config), ours


PRESETS = {
    "qwen2_moe": lambda: qwen2_moe(False),
    "qwen2_moe_normalized": lambda: qwen2_moe(True),
    "mixtral": mixtral,
    "deepseek_v2_greedy": lambda: deepseek_v2(1),
    "deepseek_v2_group_limited": lambda: deepseek_v2(4),
    "deepseek_v3": lambda: deepseek_v3(True),
    "deepseek_v3_not_normalized": lambda: deepseek_v3(False),
}
NAMES = {
    "router.weight": "gate.weight",
    "router.expert_bias": "gate.e_score_correction_bias",
    "experts.gate_up_proj": "experts.gate_up_proj",
    "experts.down_proj": "experts.down_proj",
    "shared_expert_gate.weight": "shared_expert_gate.weight",
}


def theirs_name(name, theirs):
    if name.startswith("shared_expert."):
        prefix = "shared_experts." if hasattr(theirs, "shared_experts") else "shared_expert."
        return name.replace("shared_expert.", prefix)
    return NAMES[name]


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_transformers(preset):
    generator = torch.Generator().manual_seed(0)
    theirs, options = PRESETS[preset]()
    balance = options.pop("balance", "none")
    ours = MoE(DIM, **COMMON, **options, balance=balance)
    with torch.no_grad():
        for name, parameter in (*theirs.named_parameters(), *theirs.named_buffers()):
            std = 0.1 if "bias" in name else 1.0 if name == "gate.weight" else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    source = theirs.state_dict()
    ours.load_state_dict({name: source.pop(theirs_name(name, theirs)) for name in ours.state_dict()})
    assert not source

    # Some of them route in float32 whatever the model's dtype, so this is the dtype that both speak.
    x = torch.randn(BATCH, LENGTH, DIM, generator=generator)
    grad = torch.randn(BATCH, LENGTH, DIM, generator=generator)
    results = []
    for layer, options in ((ours, {"sequence": SequenceLayout.of_rows(BATCH, LENGTH)}), (theirs, {})):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, **options)
        y.backward(grad)
        results.append({"y": y, "x": leaf.grad} | {name: p.grad for name, p in layer.named_parameters()})
    found, expected = results
    for name, tensor in found.items():
        other = expected[name if name in ("y", "x") else theirs_name(name, theirs)]
        assert (tensor - other).norm() <= 2e-6 * other.norm(), name

    gate = theirs.gate(x.flatten(0, 1))
    routing = ours.router(x.flatten(0, 1))
    assert torch.equal(routing.expert_TK.sort(-1).values, gate[2].sort(-1).values)
