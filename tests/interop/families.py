"""Tiny models of transformers with random weights, and comparisons with models of torchlmoe."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128,
)  # fmt: skip


def their_model(model_type: str, **options):
    """A model of transformers in float64. All parameters are random, also those of norms."""
    config = AutoConfig.for_model(model_type, attn_implementation="eager", experts_implementation="eager", **options)
    with torch.random.fork_rng(), all_in_float64():  # the frequencies of rotary phases too
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    perturb(model)
    return model


@torch.no_grad()
def perturb(model) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if "e_score" in n}}
    for tensor in state.values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.ndim == 1 or (tensor == tensor.flatten()[0]).all():  # norms, gates and biases
            tensor.add_(0.2 * noise)
        else:
            tensor.copy_(0.8 * noise / tensor.shape[-1] ** 0.5)


@contextmanager
def all_in_float64():
    """Makes transformers use float64 where it uses float32 for every dtype of the model."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def loaded_by_transformers(folder: Path):
    """A saved model of transformers in float64, for which no tensor is missing or unexpected."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return model


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Asserts that the norm of the difference is small, relative to that of `expected`."""
    # The last term is for gradients that are zero up to rounding: a bias on all keys changes no softmax.
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-13


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


SOFTMAX = SIZES
EXPERTS = SIZES | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
DELTANET = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
    linear_conv_kernel_dim=4, layer_types=["linear_attention", "full_attention"] * 2,
)  # fmt: skip
QWEN3_5_MOE = {
    name: value
    for name, value in (EXPERTS | DELTANET | dict(shared_expert_intermediate_size=20)).items()
    if name != "intermediate_size"
}
OLMO_HYBRID = {name: value for name, value in (SIZES | DELTANET).items() if name != "head_dim"}
LATENT = {name: size for name, size in SIZES.items() if name != "head_dim"} | dict(
    num_key_value_heads=4, moe_intermediate_size=12, num_experts_per_tok=2, kv_lora_rank=12, q_lora_rank=None,
    qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=6,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=16, beta_fast=32, beta_slow=1,
    mscale=0.7, mscale_all_dim=1.2,
)  # fmt: skip
MAMBA = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
MAMBA2 = MAMBA | dict(num_heads=8, head_dim=8, n_groups=2, chunk_size=8, tie_word_embeddings=True)
HYBRID = SIZES | dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=2, mamba_chunk_size=8, head_dim=8
)  # fmt: skip
MULTIPLIERS = dict(
    embedding_multiplier=3.5, residual_multiplier=0.22, attention_multiplier=0.3, logits_scaling=2.5,
    layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
)  # fmt: skip
NEMOTRON = SIZES | dict(
    mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=4, n_groups=2, chunk_size=8, n_routed_experts=8,
    num_experts_per_tok=3, moe_intermediate_size=12, moe_shared_expert_intermediate_size=20, routed_scaling_factor=2.5,
)  # fmt: skip
CASES = {
    "mamba": ("mamba", MAMBA),
    "mamba_unusual": (
        "mamba",
        MAMBA
        | dict(
            use_bias=True, use_conv_bias=False, tie_word_embeddings=False, expand=3, conv_kernel=3, time_step_rank=5
        ),
    ),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2_unusual": (
        "mamba2",
        MAMBA2
        | dict(
            use_bias=True, use_conv_bias=False, tie_word_embeddings=False, expand=3, num_heads=6, head_dim=16,
            n_groups=3, conv_kernel=2, time_step_limit=(0.6, 0.9), layer_norm_epsilon=1e-3,
        ),
    ),
    "bamba": ("bamba", HYBRID | dict(attn_layer_indices=[1, 2])),
    "bamba_unusual": (
        "bamba",
        HYBRID
        | dict(
            attn_layer_indices=[0], attention_bias=True, mamba_proj_bias=True, mamba_conv_bias=False,
            tie_word_embeddings=True, time_step_limit=(0.5, 1.5), mamba_expand=1, mamba_n_heads=4, mamba_n_groups=4,
            rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=5e5, partial_rotary_factor=0.25),
        ),
    ),
    "granitemoehybrid": (
        "granitemoehybrid", HYBRID | MULTIPLIERS | dict(num_local_experts=6, shared_intermediate_size=20)
    ),
    "granitemoehybrid_rope": (
        "granitemoehybrid",
        HYBRID
        | MULTIPLIERS
        | dict(
            num_local_experts=4, num_experts_per_tok=3, shared_intermediate_size=8, position_embedding_type="rope",
            attention_bias=True, tie_word_embeddings=True, mamba_proj_bias=True, mamba_conv_bias=False,
            rope_parameters=dict(rope_type="default", rope_theta=100.0), time_step_limit=(0.5, 1.5),
        ),
    ),
    "granitemoehybrid_dense_attention": (
        "granitemoehybrid",
        HYBRID
        | MULTIPLIERS
        | dict(num_local_experts=0, shared_intermediate_size=20, num_hidden_layers=2, layer_types=["attention"] * 2),
    ),
    "nemotron_h": ("nemotron_h", NEMOTRON | dict(layers_block_type=["mamba", "moe", "attention", "mlp", "mamba"])),
    "nemotron_h_unusual": (
        "nemotron_h",
        NEMOTRON
        | dict(
            layers_block_type=["moe", "mamba", "attention", "moe"], moe_latent_size=16, n_group=4, topk_group=2,
            norm_topk_prob=False, use_bias=True, use_conv_bias=False, tie_word_embeddings=False, time_step_min=0.6,
            expand=7,
        ),
    ),
    "nemotron_h_mlp_alone": ("nemotron_h", NEMOTRON | dict(layers_block_type=["mlp", "linear_attention"])),
    "llama": ("llama", SOFTMAX),
    "llama_tied_biased_scaled": (
        "llama",
        SOFTMAX
        | dict(
            tie_word_embeddings=True,
            attention_bias=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
    ),
    "qwen3": ("qwen3", SOFTMAX),
    "qwen3_windows": (
        "qwen3",
        SOFTMAX | dict(sliding_window=5, use_sliding_window=True, max_window_layers=2, attention_bias=True),
    ),
    "mixtral": ("mixtral", SOFTMAX | dict(num_local_experts=6, num_experts_per_tok=2)),
    "mixtral_window": (
        "mixtral",
        SOFTMAX | dict(num_local_experts=4, num_experts_per_tok=3, sliding_window=6, tie_word_embeddings=True),
    ),
    "qwen3_moe": ("qwen3_moe", EXPERTS | dict(norm_topk_prob=True)),
    "qwen3_moe_dense_layers": ("qwen3_moe", EXPERTS | dict(mlp_only_layers=[0], decoder_sparse_step=2)),
    "qwen2_moe": ("qwen2_moe", EXPERTS | dict(shared_expert_intermediate_size=20)),
    "qwen2_moe_dense_layers": (
        "qwen2_moe", EXPERTS | dict(shared_expert_intermediate_size=20, mlp_only_layers=[1], qkv_bias=False)
    ),
    "olmoe": ("olmoe", SOFTMAX | dict(num_experts=6, num_experts_per_tok=2, head_dim=8)),
    "olmoe_renormalized": (
        "olmoe", SOFTMAX | dict(num_experts=4, num_experts_per_tok=3, head_dim=8, norm_topk_prob=True)
    ),
    "qwen3_next": ("qwen3_next", EXPERTS | DELTANET | dict(shared_expert_intermediate_size=20)),
    "qwen3_next_unusual": (
        "qwen3_next",
        EXPERTS
        | DELTANET
        | dict(
            shared_expert_intermediate_size=8, linear_num_key_heads=4, norm_topk_prob=False, mlp_only_layers=[0, 3],
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.5),
            layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
        ),
    ),
    "qwen3_5_text": ("qwen3_5_text", SOFTMAX | DELTANET),
    "qwen3_5_text_unusual": (
        "qwen3_5_text",
        SOFTMAX
        | DELTANET
        | dict(
            num_hidden_layers=3, layer_types=["full_attention", "linear_attention", "linear_attention"],
            linear_num_key_heads=1, linear_value_head_dim=4, linear_conv_kernel_dim=3, tie_word_embeddings=True,
            num_key_value_heads=1, rms_norm_eps=1e-5,
            rope_parameters=dict(
                rope_type="default", rope_theta=1e6, partial_rotary_factor=0.5, mrope_section=[1, 2, 1],
                mrope_interleaved=True,
            ),
        ),
    ),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", QWEN3_5_MOE),
    "qwen3_5_moe_text_unusual": (
        "qwen3_5_moe_text",
        QWEN3_5_MOE
        | dict(
            num_hidden_layers=3, layer_types=["linear_attention", "linear_attention", "full_attention"],
            linear_num_key_heads=4, tie_word_embeddings=True, num_experts=4, num_experts_per_tok=3,
            shared_expert_intermediate_size=8,
        ),
    ),
    "olmo_hybrid": ("olmo_hybrid", OLMO_HYBRID),
    "olmo_hybrid_unusual": (
        "olmo_hybrid",
        OLMO_HYBRID
        | dict(
            num_hidden_layers=3, layer_types=["full_attention", "linear_attention", "linear_attention"],
            linear_num_key_heads=1, linear_value_head_dim=8, linear_conv_kernel_dim=3, linear_allow_neg_eigval=False,
            num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-4,
            rope_parameters=dict(rope_type="default", rope_theta=None),
        ),
    ),
    "olmo_hybrid_defaults": (
        "olmo_hybrid", {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    ),
    "deepseek_v2": ("deepseek_v2", LATENT | dict(n_routed_experts=6, first_k_dense_replace=1)),
    "deepseek_v2_groups_yarn": (
        "deepseek_v2",
        LATENT
        | dict(
            n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, n_shared_experts=1,
            topk_method="group_limited_greedy",
            routed_scaling_factor=3.0, q_lora_rank=14, v_head_dim=18, attention_bias=True, rope_parameters=YARN,
        ),
    ),
    "deepseek_v3": (
        "deepseek_v3", LATENT | dict(n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1)
    ),
    "deepseek_v3_unusual": (
        "deepseek_v3",
        LATENT
        | dict(
            n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=0, q_lora_rank=10, n_shared_experts=2,
            norm_topk_prob=False, routed_scaling_factor=0.5, attention_bias=True, tie_word_embeddings=True,
            num_hidden_layers=2, num_experts_per_tok=3, rope_parameters=YARN, rms_norm_eps=1e-3,
        ),
    ),
    "kimi_linear": (
        "kimi_linear",
        LATENT
        | dict(
            num_local_experts=6, linear_head_dim=8, linear_num_heads=3,
            layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        ),
    ),
    "kimi_linear_unusual": (
        "kimi_linear",
        LATENT
        | dict(
            num_local_experts=8, n_group=4, topk_group=2, n_shared_experts=2, norm_topk_prob=False,
            routed_scaling_factor=1.0, q_lora_rank=10, attention_bias=True,
            linear_head_dim=12, linear_num_heads=2, linear_conv_kernel_dim=3, rms_norm_eps=1e-3,
            layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
            mlp_layer_types=["dense", "sparse", "dense", "sparse"],
        ),
    ),
    "minimax": (
        "minimax",
        SOFTMAX
        | dict(
            num_local_experts=6, num_hidden_layers=3, full_attn_alpha_factor=1.5, linear_attn_alpha_factor=2.5,
            mlp_alpha_factor=3,
        ),
    ),
    "minimax_unusual": (
        "minimax",
        SOFTMAX
        | dict(
            num_local_experts=4, num_experts_per_tok=3, num_hidden_layers=3, head_dim=12, num_key_value_heads=1,
            full_attn_beta_factor=0.5, linear_attn_beta_factor=0.25, mlp_beta_factor=1.25, sliding_window=6,
            tie_word_embeddings=True, rms_norm_eps=1e-3,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
        ),
    ),
}  # fmt: skip
