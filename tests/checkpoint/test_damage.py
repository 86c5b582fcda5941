"""A checkpoint that is not as it was written is refused with the name of the file; the one before can be used."""

import json
import re
import shutil

import pytest
import torch.distributed as dist

from tests.checkpoint.conftest import LOSS_FREE, arguments, records, train
from torchlmoe.checkpoint import open_model
from torchlmoe.checkpoint.manifest import NAME, verify
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

LAST = "checkpoints/step-00000008"


@pytest.fixture(scope="module")
def other(corpus, tmp_path_factory):
    """Another run: the same settings but for the seed."""
    folder = tmp_path_factory.mktemp("other") / "run"
    train(corpus, folder, f"{LOSS_FREE} --training.seed 1")
    dist.destroy_process_group()
    return folder


def truncated(path, other):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path, other):
    path.write_bytes(b"")


def flipped(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def removed(path, other):
    path.unlink()


def swapped(path, other):
    shutil.copy(other / LAST / path.name, path)


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, removed, swapped])
def test_every_damaged_file_is_named(damage, single, other, tmp_path):
    for file in sorted((single / LAST).iterdir()):
        if damage is swapped and (other / LAST / file.name).read_bytes() == file.read_bytes():
            assert file.name == "tokenizer.json"
            continue
        copy = shutil.copytree(single / LAST, tmp_path / file.name / "step-00000008")
        damage(copy / file.name, other)
        # Of a whole manifest that is another run's, the first file that does not fit it is named.
        named = "config.toml" if damage is swapped and file.name == NAME else file.name
        with pytest.raises(ValueError, match=r"manifest|damaged|missing|bytes") as error:
            verify(copy)
        assert str(copy / named) in str(error.value)
        with pytest.raises(ValueError, match=re.escape(str(copy / named))):
            open_model(copy)


def test_every_byte_of_the_manifest_counts(tmp_path, single):
    copy = shutil.copytree(single / LAST, tmp_path / "copy")
    path = copy / NAME
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=NAME):
            verify(copy)
    path.write_bytes(content)
    verify(copy)


def test_a_file_too_many_is_named(single, tmp_path):
    copy = shutil.copytree(single / LAST, tmp_path / "copy")
    shutil.copy(copy / "shard-00001-model-00001-of-00001.safetensors", copy / "shard-00002.safetensors")
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors does not belong"):
        verify(copy)


def test_the_one_before_serves(single, corpus, tmp_path, process_group):
    folder = shutil.copytree(single, tmp_path / "run")
    flipped(folder / LAST / "shard-00001-model-00001-of-00001.safetensors", None)
    with pytest.raises(ValueError, match=r"is damaged: .*start again with --checkpoint\.load_step 4"):
        Trainer(load_config(arguments(corpus, folder, LOSS_FREE)))
    train(corpus, folder, f"{LOSS_FREE} --checkpoint.load_step 4")
    verify(folder / LAST)  # saved anew under the damaged one's name
    assert records(folder) == records(single)
    flipped(folder / LAST / "shard-00001-model-00001-of-00001.safetensors", None)
    with pytest.raises(ValueError, match=r"is damaged: .*; move .*step-00000008 away to resume from the one before"):
        Trainer(load_config(arguments(corpus, folder, f"{LOSS_FREE} --checkpoint.load_step 4")))
    shutil.rmtree(folder / LAST)
    assert train(corpus, folder, LOSS_FREE).progress.step == 8


def test_nothing_is_pickled(single):
    for file in (single / LAST).iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.suffix in (".toml", ".safetensors")
