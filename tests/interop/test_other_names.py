"""Folders whose tensors have other names than transformers writes: multimodal models, authors' files, modules."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.interop.families import (
    CASES,
    all_in_float64,
    loaded_by_transformers,
    near,
    perturb,
    tensors_of,
    their_model,
)
from torchlmoe import export, import_model
from torchlmoe.checkpoint import open_model
from torchlmoe.interop.families import FAMILIES, language_config

TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
VISION = dict(
    depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=16
)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"), [("qwen3_5", "qwen3_5_text", True), ("qwen3_5_moe", "qwen3_5_moe_text", False)]
)
def test_the_language_model_is_taken(outer, inner, tied, tmp_path, caplog):
    options = {**CASES[inner][1], "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = AutoConfig.for_model(outer, text_config=options, vision_config=VISION, tie_word_embeddings=tied)
    with all_in_float64():
        theirs = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    theirs.set_attn_implementation("eager")
    theirs.set_experts_implementation("eager")
    perturb(theirs)
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    num_vision = sum(name.startswith("model.visual.") for name in tensors)
    tensors |= {"mtp.norm.weight": torch.ones(32), "mtp.layers.0.input_layernorm.weight": torch.ones(32)}
    if tied:  # a file may have the tied weight twice
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with caplog.at_level(logging.INFO, logger="torchlmoe"):
        import_model.main(["--model", str(folder), "--output", str(tmp_path / "run")])
    assert f"Left out: {num_vision + 2 + tied} tensors" in caplog.text
    ours, config, tokenizer = open_model(tmp_path / "run")
    assert config.model.tie_embeddings == tied
    assert tokenizer.end_id == 2
    with torch.no_grad(), all_in_float64():
        logits = theirs(input_ids=TOKENS, use_cache=False).logits
    with torch.no_grad():
        near(ours(TOKENS), logits)

    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "text"), "--format", inner])
    with torch.no_grad(), all_in_float64():
        near(loaded_by_transformers(tmp_path / "text")(TOKENS, use_cache=False).logits, logits)


def test_no_text_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "hidden_size": 4}))
    with pytest.raises(ValueError, match="model_type = 'qwen3_5' must have an object text_config; it has None"):
        open_model(tmp_path)


def test_keys_beside_text_config_are_kept():
    """For example those of quantized weights, which cannot be read."""
    content = {"model_type": "qwen3_5", "text_config": {"hidden_size": 4}, "image_token_id": 7, "vision_config": {}}
    assert language_config(content) == {"model_type": "qwen3_5_text", "hidden_size": 4}
    options = CASES["qwen3_5_text"][1] | {"rope_parameters": {"rope_theta": 1e4}}
    quantized = {**content, "text_config": options, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ValueError, match=r"quantization_config = .*, an option without a counterpart"):
        FAMILIES["qwen3_5_text"].settings(language_config(quantized), "config.json")


def test_olmo_hybrid_of_its_authors(tmp_path):
    """Their norms have the names of transformers' modules, and their convolutions are cut between q, k and v."""
    model_type, options = CASES["olmo_hybrid"]
    their_model(model_type, **options).save_pretrained(tmp_path)
    expected = open_model(tmp_path)[0].state_dict()
    saved = load_file(tmp_path / "model.safetensors")
    keys, values = (
        options[f"linear_num_{kind}_heads"] * options[f"linear_{kind}_head_dim"] for kind in ("key", "value")
    )
    for layer in (0, 2):
        names = [f"model.layers.{layer}.linear_attn.{part}_conv1d.weight" for part in "qkv"]
        joined = torch.cat([saved[name] for name in names])
        parts = joined.split([keys, keys, values])
        saved |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    renamed = {"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"}
    for ours, theirs in renamed.items():
        saved = {name.replace(ours, theirs): tensor for name, tensor in saved.items()}
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_model(tmp_path)[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name", ["granitemoehybrid", "kimi_linear", "mixtral", "nemotron_h", "qwen2_moe", "qwen3_5_moe_text", "qwen3_next"]
)
def test_names_of_modules(name, tmp_path):
    """transformers saves them with save_original_format=False: stacked experts, and in some families other names."""
    model_type, options = CASES[name]
    theirs = their_model(model_type, **options)
    theirs.save_pretrained(tmp_path / "file")
    theirs.save_pretrained(tmp_path / "module", save_original_format=False)
    assert tensors_of(tmp_path / "file").keys() != tensors_of(tmp_path / "module").keys()
    of_file, of_module = (open_model(tmp_path / folder)[0].state_dict() for folder in ("file", "module"))
    assert of_file.keys() == of_module.keys()
    assert all(torch.equal(of_module[key], tensor) for key, tensor in of_file.items())
