"""Models of flash-linear-attention: what a committed script has written of them, held against ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.fla_weights import weights_of
from torchlmoe import export, import_model
from torchlmoe.checkpoint import open_model
from torchlmoe.interop.families import FAMILIES
from torchlmoe.interop.rules import convert

WRITTEN = json.loads((Path(__file__).parent.parent / "fixtures" / "fla_models.json").read_text())
TOKENS, BOUNDS = torch.tensor(WRITTEN["tokens"]), torch.tensor([WRITTEN["bounds"]], dtype=torch.int32)


def folder_of(name, folder):
    """A folder as fla saves it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WRITTEN["models"][name]["config"]))
    save_file(weights_of(WRITTEN["models"][name]["shapes"]), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", WRITTEN["models"])
def test_there_and_back(name, tmp_path):
    theirs = WRITTEN["models"][name]
    folder = folder_of(name, tmp_path / "theirs")
    import_model.main(["--model", str(folder), "--output", str(tmp_path / "run")])
    ours, _, _ = open_model(tmp_path / "run")
    with torch.no_grad():
        found = {"logits": ours(TOKENS)[0], "packed": ours(TOKENS, BOUNDS)[0]}
    for key, logits in found.items():
        expected = torch.tensor(theirs[key])
        assert (logits - expected).norm() <= 1e-5 * expected.norm(), key

    model_type = theirs["config"]["model_type"]
    labels = torch.cat([TOKENS[:, 1:], torch.tensor([[-100]])], 1)
    ours(TOKENS, None, labels).backward()
    of_ours = {parameter_name: parameter.grad for parameter_name, parameter in ours.named_parameters()}
    gradients = convert(of_ours, FAMILIES[model_type].rules(ours), reverse=True)
    along = weights_of(theirs["shapes"])
    for key, (norm, product) in theirs["gradients"].items():
        gradient = gradients[key.replace("g_norm.", "g_norm_swish_gate.") if model_type == "gla" else key]
        assert abs(gradient.norm() - norm) <= 1e-4 * norm, key
        assert abs((gradient * along[key]).sum() - product) <= 1e-4 * norm * along[key].norm(), key

    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "again"), "--format", model_type])
    saved, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    content = json.loads((tmp_path / "again" / "config.json").read_text())
    if content["fuse_norm"] and not theirs["config"]["fuse_norm"]:
        written = {key.replace("g_norm_swish_gate", "g_norm"): tensor for key, tensor in written.items()}
    assert saved.keys() == written.keys()
    assert all(torch.equal(tensor, written[key]) for key, tensor in saved.items())
    read, read_again = (FAMILIES[model_type].settings(each, "config.json") for each in (theirs["config"], content))
    assert read == read_again
    differing = {key for key, value in content.items() if theirs["config"].get(key) != value}
    assert differing <= {"intermediate_size", "num_v_heads", "dtype", "fuse_norm"}


REFUSED = {
    "gla": [
        {"num_kv_heads": 1}, {"use_short_conv": True}, {"use_output_gate": False}, {"feature_map": "relu"},
        {"clamp_min": -1.0}, {"elementwise_affine": False}, {"hidden_act": "powlu"}, {"attnres_block_size": 2},
    ],
    "gated_deltanet": [{"use_gate": False}, {"use_short_conv": False}, {"output_gate_activation": "sigmoid"}],
    "rwkv7": [
        {"hidden_act": "swish"}, {"value_dim": [32, 32, 64]}, {"value_dim": 64},
        {"attn": {"layers": [1], "num_heads": 2}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name, rows in REFUSED.items() for keys in rows])
def test_refused(name, keys):
    content = {**WRITTEN["models"][name]["config"], **keys}
    (key,) = keys
    with pytest.raises(ValueError, match=f"config.json has {key} = .*, an option without a counterpart"):
        FAMILIES[name].settings(content, "config.json")


def test_refused_attention():
    content = WRITTEN["models"]["gla"]["config"]
    for attn, sentence in (
        (dict(layers=[2], num_heads=2), "The attn of config.json has layers = 2, which must be from 0 to 1."),
        ([5], "config.json has 5 in its attn, which must be an object"),
        (dict(layers=[0, 0], num_heads=2), "The attn of config.json has layer 0 twice."),
        (dict(layers=[0], num_heads=2, qk_norm=True), "The attn of config.json has qk_norm = True, an option without"),
    ):
        with pytest.raises(ValueError, match="attn") as caught:
            FAMILIES["gla"].settings({**content, "attn": attn}, "config.json")
        assert str(caught.value).startswith(sentence)
