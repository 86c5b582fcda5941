"""Folders as authors publish them, which differ from what transformers saves; and what is refused, by name."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.interop.families import CASES, tensors_of, their_model
from torchlmoe.checkpoint import open_model
from torchlmoe.config.load import config_from
from torchlmoe.interop.families import FAMILIES
from torchlmoe.model.decoder import build_on_meta, count_parameters

TOKENS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))


def saved(name, tmp_path, **options):
    model_type, usual = CASES[name]
    theirs = their_model(model_type, **usual | options)
    theirs.save_pretrained(tmp_path / "saved")
    return theirs


@torch.no_grad()
def logits(folder):
    return open_model(folder)[0](TOKENS)


def changed(tmp_path, *, config=None, drop=(), tensors=None, rename=lambda name: name):
    """A copy of the folder with other keys in config.json and other tensors."""
    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    content = json.loads((tmp_path / "saved/config.json").read_text())
    content = {name: value for name, value in content.items() if name not in drop} | (config or {})
    (folder / "config.json").write_text(json.dumps(content))
    found = {rename(name): tensor for name, tensor in tensors_of(tmp_path / "saved").items() if name not in drop}
    save_file(found | (tensors or {}), folder / "model.safetensors")
    return folder


def test_kimi_linear_as_published(tmp_path):
    theirs = saved("kimi_linear", tmp_path)
    expected = logits(tmp_path / "saved")
    linear = dict(full_attn_layers=[4], kda_layers=[1, 2, 3], head_dim=8, num_heads=3, short_conv_kernel_size=4)
    published = dict(
        linear_attn_config=linear, head_dim=72, mla_use_nope=True, moe_layer_freq=1, first_k_dense_replace=1,
        moe_router_activation_func="sigmoid", use_grouped_topk=True, num_nextn_predict_layers=0, rope_scaling=None,
        rope_theta=10000.0,
    )  # fmt: skip
    names = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
    folder = changed(
        tmp_path, config=published, drop=names,
        rename=lambda name: re.sub(r"layers\.0\.block_sparse_moe\.", "layers.0.mlp.", name),
    )  # fmt: skip
    assert any("layers.0.mlp." in name for name in tensors_of(folder))
    assert torch.equal(logits(folder), expected)
    # As transformers has them in memory: stacked experts, one convolution.
    stacked = tmp_path / "stacked"
    shutil.copytree(tmp_path / "saved", stacked)
    save_file(theirs.state_dict(), stacked / "model.safetensors")
    assert torch.equal(logits(stacked), expected)
    # Layers are counted from 1, each once, and nothing else is known of them.
    for wrong, sentence in {
        "kda_layers": ([1, 2], "must name each layer from 1 to 4 once"),
        "full_attn_layers": ([0], "must name each layer from 1 to 4 once"),
        "gate_lower_bound": (-5.0, "gate_lower_bound = -5.0, an option without a counterpart"),
    }.items():
        config = published | dict(linear_attn_config=linear | {wrong: sentence[0]})
        with pytest.raises(ValueError, match=sentence[1]):
            logits(changed(tmp_path, config=config, drop=names))


def test_multi_token_prediction_of_deepseek_v3_is_left_out(tmp_path, caplog):
    saved("deepseek_v3", tmp_path)
    caplog.set_level("INFO")
    extra = {f"model.layers.4.{name}.weight": torch.ones(3) for name in ("eh_proj", "enorm", "shared_head.head")}
    assert torch.equal(logits(changed(tmp_path, tensors=extra)), logits(tmp_path / "saved"))
    assert "Left out: 3 tensors that have no place in the model, such as model.layers.4.eh_proj.weight." in caplog.text
    with pytest.raises(ValueError, match=r"No rule takes model\.layers\.5\.enorm\.weight"):
        logits(changed(tmp_path, tensors={"model.layers.5.enorm.weight": torch.ones(3)}))


def test_minimax_without_its_buffers_and_with_part_of_a_head_turned(tmp_path):
    saved("minimax", tmp_path)
    expected = logits(tmp_path / "saved")
    buffers = [name for name in tensors_of(tmp_path / "saved") if name.endswith(("_rate", "_decay"))]
    assert len(buffers) == 4
    assert torch.equal(logits(changed(tmp_path, drop=buffers, config={"block_size": 64})), expected)
    part = open_model(changed(tmp_path, config={"rotary_dim": 8}))[0]
    assert [block.mixer.rotary_dim for index, block in part.blocks.items() if index != "1"] == [8, 8]
    assert FAMILIES["minimax"].config(part)["rotary_dim"] == 8
    with torch.no_grad():
        assert not torch.allclose(part(TOKENS), expected)


@pytest.mark.parametrize(
    ("name", "prefix"), [("deepseek_v3_unusual", "model."), ("qwen3_5_text_unusual", "model.language_model.")]
)
def test_tied_embeddings_that_differ_are_refused(name, prefix, tmp_path):
    saved(name, tmp_path)
    embedding = tensors_of(tmp_path / "saved")["model.embed_tokens.weight"]
    prefixed = dict(rename=lambda name: name.replace("model.", prefix, 1))
    twice = changed(tmp_path, tensors={"lm_head.weight": embedding.clone()}, **prefixed)
    assert torch.equal(logits(twice), logits(tmp_path / "saved"))
    sentence = rf"lm_head\.weight that differs from {prefix}embed_tokens\.weight, .* set tie_word_embeddings = false"
    with pytest.raises(ValueError, match=sentence):
        logits(changed(tmp_path, tensors={"lm_head.weight": embedding + 1e-9}, **prefixed))


YARN = dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)
DEEPSEEK = dict(
    attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001, ep_size=1, hidden_act="silu", kv_lora_rank=512,
    moe_layer_freq=1, pretraining_tp=1, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6,
    rope_theta=10000, seq_aux=True, tie_word_embeddings=False, v_head_dim=128,
)  # fmt: skip
PUBLISHED = {  # sizes in config.json on the hub, parameters, and mscale
    "deepseek_v2": (  # V2-Lite
        DEEPSEEK
        | dict(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, n_group=1,
            num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, topk_group=1,
            n_routed_experts=64, num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=None,
            routed_scaling_factor=1.0, norm_topk_prob=False, scoring_func="softmax", topk_method="greedy",
            rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
        ),
        15.7e9,
        0.707,
    ),
    "deepseek_v3": (
        DEEPSEEK
        | dict(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, n_group=8,
            num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1, topk_group=4,
            n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3, q_lora_rank=1536,
            routed_scaling_factor=2.5, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc",
            num_nextn_predict_layers=1, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
        671e9,
        1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_config_of_deepseek_as_published(model_type, tmp_path):
    content, parameters, mscale = PUBLISHED[model_type]
    content = {"model_type": model_type, **content}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    tables = FAMILIES[model_type].settings(content, "config.json")
    ours = build_on_meta(config_from([tables]), content["vocab_size"])
    assert count_parameters(ours) == sum(parameter.numel() for parameter in theirs.parameters())
    assert count_parameters(ours) == pytest.approx(parameters, rel=0.003)
    scale = ours.blocks["0"].mixer.softmax_scale
    assert scale == pytest.approx(theirs.model.layers[0].self_attn.scaling, rel=1e-12)
    assert scale == pytest.approx((0.1 * mscale * math.log(40) + 1) ** 2 / 192**0.5)


WITHOUT_COUNTERPART = {
    "deepseek_v2": dict(
        norm_topk_prob=True, topk_method="noaux_tc", mlp_bias=True, num_key_value_heads=2, scoring_func="sigmoid",
        moe_layer_freq=2, head_dim=16, attention_dropout=0.1, hidden_act="gelu", quantization_config={"bits": 8},
    ),
    "deepseek_v3": dict(
        rope_interleave=False, topk_method="greedy", scoring_func="softmax", num_nextn_predict_layers=2, head_dim=16,
    ),
    "kimi_linear": dict(
        tie_word_embeddings=True, mla_use_nope=False, moe_router_activation_func="softmax", num_key_value_heads=2,
        num_nextn_predict_layers=1, use_grouped_topk=False,
    ),
    "minimax": dict(postnorm=False, router_jitter_noise=0.1, shared_intermediate_size=8, hidden_act="gelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_COUNTERPART)
def test_options_without_a_counterpart_are_refused(name):
    model_type, options = CASES[name]
    content, family = AutoConfig.for_model(model_type, **options).to_dict(), FAMILIES[model_type]
    tables = family.settings(content, "config.json")
    assert family.settings(family.config(build_on_meta(config_from([tables]), 64)), "config.json") == tables
    for key, value in WITHOUT_COUNTERPART[name].items():
        with pytest.raises(ValueError, match=f"^config.json has {key} = .* without a counterpart"):
            family.settings(content | {key: value}, "config.json")


NOT_EXPORTED = {
    "deepseek_v3 without a latent": ("deepseek_v3", "qwen3_moe", {}, "no latent attention, but deepseek_v3 needs it"),
    "kimi_linear without attention": (
        "kimi_linear", "kimi_linear", dict(layer_types=["linear_attention"] * 4), "no layer with the mixer attention",
    ),
    "kimi_linear with a mixer of others": (
        "kimi_linear", "qwen3_next", {}, r"Block 0 has the mixer gated_deltanet; kimi_linear has only kda and attention"
    ),
    "minimax without lightning attention": ("minimax", "llama", {}, "no layer with the mixer lightning"),
    "deepseek_v2 without experts": ("deepseek_v2", "llama", {}, "class MoE, but deepseek_v2 needs one"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_models_that_a_family_cannot_hold_are_refused(name):
    model_type, case, options, sentence = NOT_EXPORTED[name]
    source, usual = CASES[case]
    content = AutoConfig.for_model(source, **usual | options).to_dict()
    model = build_on_meta(config_from([FAMILIES[source].settings(content, "config.json")]), 64)
    with pytest.raises(ValueError, match=sentence):
        FAMILIES[model_type].config(model)
