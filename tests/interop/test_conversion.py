"""What importing and exporting do beyond equal numbers: bad folders, files that travel along, generation, training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.interop.families import CASES, all_in_float64, their_model
from torchlmoe import export, import_model
from torchlmoe.checkpoint import open_model, transformers_folder
from torchlmoe.inference.generate import generate

ASSETS = Path(__file__).parent.parent.parent / "assets"
SHARDED, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Mixtral in two shards."""
    folder = tmp_path_factory.mktemp("saved") / "mixtral"
    their_model(*CASES["mixtral"][:1], **CASES["mixtral"][1]).save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def of_json(file, change):
    def alter(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return alter


def of_config(**keys):
    return of_json("config.json", lambda content: content.update(keys))


def of_shard(change):
    def alter(folder):
        tensors = load_file(folder / SHARDED)
        change(tensors)
        save_file(tensors, folder / SHARDED)

    return alter


def truncate(folder):
    content = (folder / SHARDED).read_bytes()
    (folder / SHARDED).write_bytes(content[:-100])


def elsewhere(content):
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../other.safetensors")


def another_file(content):
    name = next(name for name, file in content["weight_map"].items() if file == SHARDED)
    content["weight_map"][name] = SHARDED.replace("00001-of", "00002-of")


def pickled_only(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


NORM = "model.layers.0.input_layernorm.weight"
BAD_FOLDERS = {
    "missing shard": (lambda folder: (folder / SHARDED).unlink(), "is missing, but model.safetensors.index.json"),
    "truncated shard": (truncate, r"model-00001-of-00002\.safetensors is damaged or gone"),
    "index elsewhere": (
        of_json(INDEX, elsewhere),
        r"names the file '\.\./other\.safetensors', which is not in the same",
    ),
    "index of another file": (of_json(INDEX, another_file), "that model.safetensors.index.json lists"),
    "no weight map": (lambda folder: (folder / INDEX).write_text("{}"), "weight_map is missing"),
    "pickles": (pickled_only, r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    "unknown family": (of_config(model_type="gpt2"), "model_type = 'gpt2', which cannot be imported; supported are"),
    "option": (of_config(router_jitter_noise=0.1), "router_jitter_noise = 0.1, an option without a counterpart"),
    "unknown option": (of_config(hyper_connections=4), "hyper_connections = 4, an option without a counterpart"),
    "activation": (of_config(hidden_act="gelu"), "hidden_act = 'gelu', an option without a counterpart"),
    "quantized": (of_config(quantization_config={"bits": 4}), "quantization_config = .*, an option without"),
    "no size": (of_json("config.json", lambda content: content.pop("hidden_size")), "has no hidden_size"),
    "odd size": (of_config(num_attention_heads="four"), "num_attention_heads = 'four', which must be of type int"),
    "no layers": (of_config(num_hidden_layers=0), "num_hidden_layers = 0, which must be at least 1"),
    "odd wavelengths": (of_config(rope_parameters={"rope_type": "dynamic"}), "rope_type = 'dynamic', which has no"),
    "more layers": (of_config(num_hidden_layers=5), r"model\.layers\.4\.\S+ is missing"),
    "fewer layers": (of_config(num_hidden_layers=3), r"No rule takes model\.layers\.3\."),
    "more words": (of_config(vocab_size=65), r"embedding\.weight of shape \[64, 32\], but config\.json asks for \[65"),
    "another shape": (of_shard(lambda tensors: tensors.update({NORM: torch.ones(8)})), r"of shape \[8\], but config"),
    "another tensor": (of_shard(lambda tensors: tensors.update(other=torch.ones(8))), "No rule takes other"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(case, saved, tmp_path):
    alter, sentence = BAD_FOLDERS[case]
    shutil.copytree(saved, tmp_path / "model")
    alter(tmp_path / "model")
    with pytest.raises(ValueError, match=sentence):
        import_model.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_full_disk(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match=r"could not be written to .* GiB are needed, and 0\.00 GiB are free; make room"):
        import_model.main(["--model", str(saved), "--output", str(tmp_path / "run")])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_has_no_counterpart_is_not_exported(saved, tmp_path):
    import_model.main(["--model", str(saved), "--output", str(tmp_path / "run")])
    for model_type, sentence in {
        "llama": "has no feed-forward layer of class Dense, but llama needs one: choose another --format",
        "qwen3_moe": "blocks.0.mixer.qk_norm is False, for which qwen3_moe has no counterpart",
        "nothing": "--format nothing is unknown: choose from torchlmoe, ",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            export.main(
                ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--format", model_type]
            )
        assert not (tmp_path / "out").exists()


def test_files_that_travel_along(tmp_path, caplog):
    """The tokenizer with its end token, ids, generation settings; tensors without a place are left out and counted."""
    theirs, name = tmp_path / "theirs", "qwen3_next"
    their_model(CASES[name][0], **CASES[name][1] | dict(vocab_size=4096)).save_pretrained(theirs)
    tokenizer = json.loads((ASSETS / "tokenizer.json").read_text())
    (theirs / "tokenizer.json").write_text(json.dumps(tokenizer))
    (theirs / "generation_config.json").write_text('{"eos_token_id": [17, 5], "top_k": 4}')
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    tensors = load_file(theirs / "model.safetensors")
    extra = {"mtp.layers.0.weight": torch.ones(3), "mtp.norm.weight": torch.ones(3)}
    save_file({**tensors, **extra}, theirs / "model.safetensors")
    with caplog.at_level("INFO", logger="torchlmoe"):
        import_model.main(["--model", str(theirs), "--output", str(tmp_path / "run")])
    assert "Left out: 2 tensors that have no place in the model, such as mtp.layers.0.weight." in caplog.text
    _, config, found = open_model(tmp_path / "run")
    assert found.end_id == 17
    assert config.data.tokenizer == str(tmp_path / "run/import")
    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--format", name])
    for file in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (theirs / file).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "out"))
    assert not {key for key in before if after.get(key) != before[key]}
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys()


# The other families have caches as these have, but for lightning attention and a latent with rotary phases.
GENERATING = ["qwen3_windows", "qwen3_next", "kimi_linear"]
MORE = ["llama", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "minimax", "mamba", "granitemoehybrid"]


@pytest.mark.parametrize("name", [*GENERATING, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_greedy_generation(name, tmp_path):
    theirs = their_model(CASES[name][0], **CASES[name][1])
    theirs.save_pretrained(tmp_path)
    ours, _, _ = open_model(tmp_path)
    prompts = [[5, 9, 31, 40, 12, 3, 7], [11, 60, 4, 4, 18, 25, 33]]
    with all_in_float64():
        expected = theirs.generate(
            torch.tensor(prompts), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    found = generate(ours, prompts, max_new_tokens=64)
    assert [prompt + tokens for prompt, tokens in zip(prompts, found, strict=True)] == expected.tolist()


TRAINED = ["mixtral", "qwen3_next", "granitemoehybrid", pytest.param("kimi_linear", marks=pytest.mark.long)]


@pytest.mark.parametrize("name", TRAINED)
def test_training_continues_alike(name, tmp_path):
    """Twenty steps of AdamW, from the same weights on the same batch, without a balance loss."""
    theirs = their_model(CASES[name][0], **CASES[name][1] | dict(router_aux_loss_coef=0.0))
    theirs.save_pretrained(tmp_path)
    ours, _, _ = open_model(tmp_path)
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(2))
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    losses = {"theirs": [], "ours": []}
    for who, model in (("theirs", theirs.train()), ("ours", ours.train())):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(20):
            if who == "ours":
                loss = model(tokens, None, labels) / 46
            else:
                with all_in_float64():
                    logits = model(tokens, use_cache=False).logits
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            losses[who].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-6)
    assert losses["ours"][-1] < 0.9 * losses["ours"][0]


def test_numbers_as_text(saved):
    _, _, tokenizer = open_model(saved)
    assert tokenizer.encode_batch(["17 3 63"]) == [[17, 3, 63]]
    assert tokenizer.decode([17, 3]) == "17 3"
    assert transformers_folder.is_transformers(saved)
