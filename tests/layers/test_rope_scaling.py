"""Scaled rotary wavelengths against transformers' functions in float64, and what is refused."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from torchlmoe.config.load import load_config
from torchlmoe.layers.rope_scaling import rope_scaling_of
from torchlmoe.layers.rotary import rotary_phases
from torchlmoe.mixers.attention import Attention

LENGTH = dict(original_max_position_embeddings=128)
TABLES = {
    "linear": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **LENGTH),
    "yarn": dict(factor=40.0, **LENGTH),
    "yarn_of_deepseek": dict(factor=40.0, mscale=0.7, mscale_all_dim=1.3, beta_fast=16.0, beta_slow=2.0, **LENGTH),
    "yarn_all_dim": dict(factor=40.0, mscale_all_dim=1.3, **LENGTH),
    "yarn_factor": dict(factor=4.0, attention_factor=1.7, truncate=False, **LENGTH),
    "yarn_one_pair": dict(factor=4.0, beta_fast=1.0001, truncate=False, **LENGTH),
}
POSITIONS = torch.tensor([[0, 1, 127, 128, 5000]])


@pytest.mark.parametrize(("case", "table"), TABLES.items())
@pytest.mark.parametrize(("rotary_dim", "base"), [(64, 10_000.0), (8, 500_000.0)])
def test_equals_transformers(case, table, rotary_dim, base, monkeypatch):
    kind = case.partition("_")[0]
    parameters = {"rope_type": kind, "rope_theta": base, **table}
    config = LlamaConfig(hidden_size=rotary_dim, num_attention_heads=1, rope_parameters=parameters)
    with monkeypatch.context() as patch:  # whose functions name the dtype
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    phase = POSITIONS[..., None, None] * frequencies
    found = rotary_phases(POSITIONS, rotary_dim, base, rope_scaling_of({"type": kind, **table}))
    torch.testing.assert_close(found, (factor * phase.cos(), factor * phase.sin()), rtol=1e-11, atol=1e-11)
    plain = rotary_phases(POSITIONS, rotary_dim, base)
    assert (found[0] - plain[0]).norm() > 1e-3 * plain[0].norm()


def test_softmax_factor():
    """Of DeepSeek-V2 and V3: the square of m(mscale_all_dim)."""
    for case, expected in (("yarn", 1.0), ("yarn_of_deepseek", (1 + 0.13 * math.log(40)) ** 2), ("linear", 1.0)):
        assert rope_scaling_of({"type": case.partition("_")[0], **TABLES[case]}).softmax_factor == expected


def test_attention_without_phases_is_as_without_scaling():
    for fraction, factor in ((0.0, 1.0), (1.0, (1 + 0.13 * math.log(40)) ** 2)):
        table = {"type": "yarn", **TABLES["yarn_of_deepseek"]}
        mixer = Attention(32, num_heads=4, rotary_fraction=fraction, softmax_scale=0.5, rope_scaling=table)
        assert mixer.softmax_scale == 0.5 * factor


def test_default_is_none():
    for table in (None, {"type": "default"}):
        found = rotary_phases(POSITIONS, 8, 100.0, rope_scaling_of(table))
        torch.testing.assert_close(found, rotary_phases(POSITIONS, 8, 100.0), rtol=0, atol=0)


REFUSED = {
    "type = 'yarm'; choose one of default, linear, llama3, yarn": dict(type="yarm"),
    "of type 'linear' has no beta_fast; it takes factor": dict(type="linear", factor=2.0, beta_fast=1.0),
    "of type 'default' has no factor; it takes nothing": dict(type="default", factor=2.0),
    "of type 'yarn' needs original_max_position_embeddings; give it": dict(type="yarn", factor=2.0),
    "beta_slow = 3.0, which must be below beta_fast = 2.0": dict(
        type="yarn", factor=2.0, beta_fast=2.0, beta_slow=3.0, **LENGTH
    ),
    "low_freq_factor = 4.0, which must be below high_freq_factor = 4.0": dict(
        type="llama3", factor=2.0, low_freq_factor=4.0, **LENGTH
    ),
    "mscale = 1.0, which has no effect without mscale_all_dim": dict(type="yarn", factor=2.0, mscale=1.0, **LENGTH),
}


@pytest.mark.parametrize(("sentence", "table"), REFUSED.items())
def test_refused(sentence, table):
    with pytest.raises(ValueError, match=sentence):
        rope_scaling_of(table)


def test_settings():
    """For the whole model, unless a letter says otherwise."""
    flags = [f"--model.rope_scaling.{name}={value}" for name, value in dict(type="linear", factor=4).items()]
    config = load_config(["--model.mixer=retention", *flags, "--model.layers.N.rope_scaling.type=default"])
    assert config.block_spec("L").mixer_options["rope_scaling"] == {"type": "linear", "factor": 4}
    assert config.block_spec("N").mixer_options["rope_scaling"] == {"type": "default"}
    for arguments, sentence in {
        "--model.rope_scaling.type=yar": "model.rope_scaling.type = 'yar' is unknown; the nearest is yarn.",
        "--model.rope_scaling.factor=2": "model.rope_scaling.type is missing; choose one of default, linear",
        "--model.layers.N.rope_scaling.type=linear": "model.layers.N.rope_scaling.factor is missing; give it a value.",
        "--model.rope_scaling.type=linear --model.rope_scaling.factor=0.5": "rope_scaling.factor = 0.5 is not valid",
        "--model.rope_scaling={type='linear',factor=2,fast=2}": "model.rope_scaling.fast is not a setting",
        "--model.rope_scaling=linear": "model.rope_scaling = 'linear' is not valid",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            load_config(arguments.split())
