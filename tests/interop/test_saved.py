"""Tables for files against transformers' own: a model's files and its modules give the same weights of ours."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from torchlmoe.interop import convert, kimi_linear, mixtral, prefixed, qwen2_moe

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=2, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2,
)  # fmt: skip


def kimi_model():
    return KimiLinearForCausalLM(
        KimiLinearConfig(
            **SIZES, num_experts=4, n_shared_experts=1, n_group=1, linear_num_heads=2, linear_head_dim=8,
            kv_lora_rank=6, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6,
            layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"],
        )
    )  # fmt: skip


def mixtral_model():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen2_model():
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_experts=4, shared_expert_intermediate_size=8))


KDA = dict(num_heads=2, head_dim=8, conv_size=4)
CASES = {  # a model, the module and its prefix in the files, the tables of modules and of files
    "kda": (
        kimi_model, "model.layers.0.self_attn.", "model.layers.0.self_attn.",
        kimi_linear.kda_rules(**KDA), kimi_linear.kda_rules(**KDA, saved=True),
    ),
    "kimi_moe": (
        kimi_model, "model.layers.1.mlp.", "model.layers.1.block_sparse_moe.",
        kimi_linear.moe_rules(), kimi_linear.moe_rules(separate_experts=4),
    ),
    "mixtral": (
        mixtral_model, "model.layers.1.mlp.", "model.layers.1.block_sparse_moe.",
        mixtral.moe_rules(), mixtral.moe_rules(separate_experts=4),
    ),
    "qwen2_moe": (
        qwen2_model, "model.layers.1.mlp.", "model.layers.1.mlp.",
        qwen2_moe.moe_rules(), qwen2_moe.moe_rules(separate_experts=4),
    ),
}  # fmt: skip


def under(prefix, tensors):
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", CASES)
def test_files_and_modules_give_the_same(name, tmp_path):
    build, module_prefix, file_prefix, module_table, file_table = CASES[name]
    model = build()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    ours = convert(under(module_prefix, model.state_dict()), prefixed(module_table, module_prefix, ""))
    found = convert(under(file_prefix, saved), prefixed(file_table, file_prefix, ""))
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.items())
