"""Exports and checkpoints that somebody altered, checksums included: one ValueError, before memory is taken."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import files_at_most
from torchlmoe import export, import_model
from torchlmoe.checkpoint import open as opening
from torchlmoe.checkpoint import open_model
from torchlmoe.checkpoint.exported import write_exported
from torchlmoe.checkpoint.folders import published
from torchlmoe.checkpoint.manifest import NAME, describe, write_manifest
from torchlmoe.checkpoint.run_record import Progress, fixed_of_model, write_run
from torchlmoe.checkpoint.state import model_state
from torchlmoe.checkpoint.writer import CheckpointWriter
from torchlmoe.config.load import load_config, to_toml
from torchlmoe.data.tokenizer import load_tokenizer
from torchlmoe.model.decoder import Decoder, build_on_meta

SMALL = """--model.dim 32 --model.num_layers 3 --model.layer_pattern LLN --model.num_heads 2 --model.mixer retention
--moe.num_experts 4 --moe.top_k 2 --moe.expert_dim 16""".split()
STEP = "run/checkpoints/step-00000000"
WEIGHTS = "model.safetensors"
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an export ("exported") and a checkpoint made of it (STEP)."""
    place = tmp_path_factory.mktemp("crafted")
    config, tokenizer = load_config(SMALL), load_tokenizer("embedded")
    model = build_on_meta(config, tokenizer.vocab_size).to_empty(device="cpu")
    model.init_weights(seed=0)
    write_exported(place / "exported", model, config, tokenizer, max_shard_bytes=1 << 30)
    model, config, tokenizer = open_model(place / "exported")
    fixed = fixed_of_model(config, tokenizer, model.embedding.num_embeddings)
    files = {
        "run.json": write_run(Progress(), fixed),
        "config.toml": to_toml(config).encode(),
        "tokenizer.json": tokenizer.content,
    }
    writer = CheckpointWriter(place / "run/checkpoints", 0, files, keep_latest_k=1)
    dcp.save(model_state(model), storage_writer=writer, no_dist=True)
    return place


def seal(folder):
    (folder / NAME).unlink(missing_ok=True)
    odd = {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in folder.iterdir() if not path.is_file()}
    write_manifest(folder, odd | {path.name: describe(path) for path in folder.iterdir() if path.is_file()})


def of_json(file, change):
    """Alters one file of JSON: change(its content)."""

    def alter(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return alter


def setting(table, **values):
    return of_json("config.json", lambda content: content["settings"][table].update(values))


def of_tensors(change, file=WEIGHTS):
    """Alter a file of tensors: change(tensors, their places in the file's metadata)."""

    def alter(folder):
        with safe_open(folder / file, "pt") as opened:
            metadata = opened.metadata()
        tensors, places = load_file(folder / file), json.loads(metadata.get("DCP_SHARDING_INFO", "{}"))
        change(tensors, places)
        if places:
            metadata["DCP_SHARDING_INFO"] = json.dumps(places)
        save_file(tensors, folder / file, metadata)

    return alter


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def cast(dtype):
    return of_tensors(lambda tensors, _: tensors.update({"head.norm.weight": torch.ones(32).to(dtype)}))


def half(tensors, places):
    name = "model.embedding.weight"
    tensors[name] = tensors[name][2048:].clone()
    places[name]["saved_offsets"] = [2048, 0]


def extra(name):
    return lambda folder: save_file({name: torch.zeros(32)}, folder / "zzz.safetensors")


def pipe(file):
    def alter(folder):
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return alter


def device(file):
    def alter(folder):
        (folder / file).unlink()
        (folder / file).symlink_to("/dev/zero")

    return alter


def other_mixer(folder):
    path = folder / "config.toml"
    path.write_text(path.read_text().replace('"retention"', '"lightning"'))


def fewer_layers(folder):
    path = folder / "config.toml"
    path.write_text(path.read_text().replace("num_layers = 3", "num_layers = 2"))
    of_json("run.json", lambda content: content["fixed"].update({"model.num_layers": 2, "model.layer_pattern": "LL"}))(
        folder
    )


DEEP = "[" * 100_000
EXPORTED = {
    "fewer layers": (setting("model", num_layers=2), "holds 3 blocks, but the settings give model.num_layers = 2"),
    "many layers": (setting("model", num_layers=10_000), "holds 3 blocks, but the settings give model.num_layers = 10"),
    "wide": (setting("model", dim=16_000), r"has shape .* but the settings give \[4096, 16000\]"),
    "wide experts": (setting("moe", expert_dim=10**6), "has shape .* but the settings give"),
    "no model": (setting("moe", expert_dim=10**18), "cannot be built"),
    "vocabulary": (of_json("config.json", lambda content: content.update(vocab_size=99)), "to a tokenizer of 4096"),
    "fewer parameters": (setting("model", tie_embeddings=True), "holds 'head.projection.weight', which the settings"),
    "an extra tensor": (extra("zzz"), "holds 'zzz', which the settings' model does not have"),
    "a tensor twice": (extra("head.norm.weight"), "head.norm.weight in .* leave out elements or overlap"),
    "another shape": (extra("embedding.weight"), "zzz.safetensors is damaged: its piece of 'embedding.weight'"),
    "integers": (cast(torch.int64), "head.norm.weight has dtype torch.int64 .* cannot be read as torch.float32"),
    "float8": (cast(torch.float8_e4m3fn), "of dtype F8_E4M3; supported are"),
    "complex": (cast(torch.complex64), "of dtype C64; supported are"),
    "no safetensors": (text(WEIGHTS, "\xff" * 99), "model.safetensors is damaged or gone"),
    "no object": (text("config.json", "[]"), "config.json cannot be used: its content = .* should be an object"),
    "a key missing": (of_json("config.json", lambda content: content.pop("end_token")), "end_token is missing"),
    "another type": (of_json("config.json", lambda content: content.update(settings=[])), "settings = .* an object"),
    "deep": (text("config.json", DEEP), "it is not JSON: recursion limit"),
    "long number": (text("config.json", '{"a": ' + "9" * 5000), "it is not JSON: number out of range"),
    "deep settings": (setting("model", layers=json.loads("[" * 150 + "]" * 150)), "is nested too deeply"),
    "text with NUL": (setting("model", flavor="a\0"), "should be UTF-8 without NUL"),
    "a weight that is a pipe": (pipe(WEIGHTS), "model.safetensors is not a regular file"),
    "a tokenizer that is a device": (device("tokenizer.json"), "tokenizer.json is not a regular file"),
}
CHECKPOINT = {
    "fewer layers": (fewer_layers, "holds 3 blocks, but the settings give model.num_layers = 2"),
    "another mixer": (other_mixer, "run.json contradict each other: model.layers.L.mixer is 'lightning'"),
    "half a tensor": (of_tensors(half, SHARD), "model.embedding.weight in .* leave out elements or overlap"),
    "no place": (of_tensors(lambda _, places: places.popitem(), SHARD), "does not say which part"),
    "odd places": (of_tensors(lambda _, places: places.update(a=[3]), SHARD), "DCP_SHARDING_INFO a = .3. is not valid"),
    "an extra tensor": (extra("model.zzz"), "holds 'model.zzz', which the settings' model does not have"),
    "no progress": (text("run.json", "{}"), "run.json cannot be used: progress is missing"),
    "odd progress": (of_json("run.json", lambda content: content["progress"].update(step="3")), "progress.step = '3'"),
    "odd record": (of_json("run.json", lambda content: content["progress"].update(record={"step": 1})), "hold numbers"),
    "no fixed": (of_json("run.json", lambda content: content["fixed"].clear()), "fixed.data.end_token is missing"),
    "deep": (text("run.json", DEEP), "it is not JSON: recursion limit"),
    "no TOML": (text("config.toml", "a = = 3"), "config.toml is not TOML"),
    "deep TOML": (text("config.toml", f"a = {'[' * 400}{']' * 400}"), "nested too deeply"),
    "long number": (text("config.toml", f"a = {'9' * 5000}"), "config.toml holds a number of more than"),
    "large TOML": (text("config.toml", "#" * 2**21), "config.toml has more than"),
    "a folder": (lambda folder: (folder / "more").mkdir(), "more is not a regular file"),
}
SEALED = {"exported": EXPORTED, STEP: CHECKPOINT}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in SEALED.items() for case in cases])
def test_what_the_checksums_do_not_show(kind, case, place, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("memory was taken before the settings were held against the tensors")

    alter, sentence = SEALED[kind][case]
    folder = shutil.copytree(place / kind, tmp_path / "step-00000000")
    alter(folder)
    seal(folder)
    monkeypatch.setattr(Decoder, "init_weights", fail)
    with pytest.raises(ValueError, match=sentence) as error:
        open_model(folder)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


MANIFESTS = {
    "pipe": (pipe(NAME), "manifest.json is not a regular file"),
    "device": (device(NAME), "manifest.json is not a regular file"),
    "deep": (text(NAME, DEEP), "manifest.json cannot be used: it is not JSON"),
    "list": (text(NAME, "[]"), "manifest.json cannot be used: its content"),
    "no sizes": (text(NAME, '{"files": {"a": {}}, "format": 1, "sha256": ""}'), "files.a.bytes is missing"),
    "odd sizes": (text(NAME, '{"files": {"a": 3}, "format": 1, "sha256": ""}'), "files.a = 3 is not valid"),
    "long number": (text(NAME, '{"format": ' + "9" * 5000), "it is not JSON: number out of range"),
}


@pytest.mark.parametrize("kind", SEALED)
@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(kind, case, place, tmp_path):
    alter, sentence = MANIFESTS[case]
    folder = shutil.copytree(place / kind, tmp_path / "step-00000000")
    alter(folder)
    with pytest.raises(ValueError, match=sentence):
        open_model(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_flipped_bit_of_an_export_is_found(file, place, tmp_path):
    folder = shutil.copytree(place / "exported", tmp_path / "exported")
    content = bytearray((folder / file).read_bytes())
    content[-100] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        open_model(folder)


def test_files_beside_an_export(place, tmp_path, caplog):
    """Text may lie beside it, tensors may not; and one of an earlier version, without checksums, is opened."""
    folder = shutil.copytree(place / "exported", tmp_path / "exported")
    (folder / "README.md").write_text("A model.")
    model, _, _ = open_model(folder)
    ours = [record for record in caplog.records if record.name.startswith("torchlmoe")]
    assert not ours
    extra("head.norm.weight")(folder)
    with pytest.raises(ValueError, match=r"zzz\.safetensors does not belong there"):
        open_model(folder)
    (folder / "zzz.safetensors").unlink()
    (folder / NAME).unlink()
    caplog.clear()
    torch.testing.assert_close(open_model(folder)[0].state_dict(), model.state_dict(), rtol=0, atol=0)
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("torchlmoe"))
    assert said.endswith("no manifest.json, like exports of earlier versions: its files are not checked for damage.")
    pipe(WEIGHTS)(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a regular file"):
        open_model(folder)


@pytest.mark.parametrize("moment", ["verify", "read_toml", "saved_tensors", "build_on_meta"])
def test_a_checkpoint_that_is_removed_while_it_is_read(moment, place, tmp_path, monkeypatch):
    """As by a run that saves on: the newest then serves."""
    root = shutil.copytree(place / "run", tmp_path / "run") / "checkpoints"
    function = getattr(opening, moment)

    def saved_again(*arguments, **options):
        (last,) = published(root).values()
        if last.name == "step-00000000":
            last.rename(root / "step-00000001")
        return function(*arguments, **options)

    monkeypatch.setattr(opening, moment, saved_again)
    assert open_model(tmp_path / "run")[0].embedding.num_embeddings == 4096
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_model(root / "step-00000000")


def test_a_checkpoint_that_is_removed_while_they_are_listed(place, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda path: not path.name.startswith("step-"))
    assert list(published(place / "run/checkpoints")) == [0]


@pytest.mark.parametrize("program", [export, import_model])
def test_full_disk(program, place, tmp_path):
    flag, what = ("--model", "checkpoint") if program is import_model else ("--checkpoint", "model")
    with (
        files_at_most(100_000),
        pytest.raises(
            OSError, match=rf"The {what} could not be written to {tmp_path}/new.*: .*too large.*; make room, or"
        ),
    ):
        program.main([flag, str(place / "exported"), "--output", str(tmp_path / "new")])
    assert [path for path in tmp_path.rglob("*") if path.is_file() or "partial" in path.name] == []


@pytest.mark.parametrize("program", [export, import_model])
def test_paths_of_the_command_line(program, place, monkeypatch, capsys):
    flag = "--model" if program is import_model else "--checkpoint"
    for bad in ("", "a\0", "\udcff", "~nobody-of-that-name/x"):
        with pytest.raises(ValueError, match=r"argument --output: .* should "):
            program.main([flag, str(place), "--output", bad])
    monkeypatch.setenv("HOME", str(place))
    program.main([flag, "~/exported", "--output", f"~/{program.__name__}"])
    assert (place / program.__name__).is_dir()
    with pytest.raises(ValueError, match="folder '' is not valid: it should not be empty"):
        open_model("")
