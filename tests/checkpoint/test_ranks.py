"""Checkpoints on 1, 2 and 4 gloo processes: from any to any, checked together, and exported as the same bytes.

A launch takes seconds, so that there is one for each number of ranks.
"""

import os
import shutil

import pytest
import torch.distributed as dist

from tests.checkpoint.conftest import LOSS_FREE, arguments, records, stopped_at_step_4, train
from tests.conftest import run_on_ranks
from torchlmoe import export
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

LAST = "checkpoints/step-00000008"
REPLICAS = "--parallelism.data_parallel_replicate_degree 2"
SPANS = "--parallelism.context_parallel_degree 2"
HEADS_AND_EXPERTS = "--parallelism.tensor_parallel_degree 2 --parallelism.expert_parallel_degree 2"


def on_four_ranks(corpus, folder):
    train(corpus, folder / "four", LOSS_FREE)
    train(corpus, folder / "one_to_four", LOSS_FREE)
    train(corpus, folder / "one_to_two_by_two", f"{LOSS_FREE} {REPLICAS} --checkpoint.async_mode async")
    train(corpus, folder / "one_to_heads", f"{LOSS_FREE} {HEADS_AND_EXPERTS}")
    # Loaded and saved again without training.
    for name, layout in (("same_on_four", ""), ("same_by_heads", HEADS_AND_EXPERTS)):
        trainer = Trainer(load_config(arguments(corpus, folder / name, f"{LOSS_FREE} {layout}")))
        trainer.checkpointer.save(trainer.progress)
        trainer.loader.close()


def on_two_ranks(corpus, folder):
    train(corpus, folder / "four_to_two", LOSS_FREE)
    train(corpus, folder / "one_to_two_spans", f"{LOSS_FREE} {SPANS}")
    train(corpus, folder / "heads_to_spans", f"{LOSS_FREE} {SPANS} --parallelism.expert_parallel_degree 2")
    with pytest.raises(ValueError, match="is damaged") as error:
        Trainer(load_config(arguments(corpus, folder / "damaged", LOSS_FREE)))
    assert "tokenizer.json" in str(error.value)
    (folder / f"refused_{dist.get_rank()}").touch()
    if dist.get_rank() == 1:
        os._exit(0)
    with pytest.raises(ConnectionError, match="Another rank ended during start-up"):
        Trainer(load_config(arguments(corpus, folder / "alone", LOSS_FREE)))
    (folder / "left_alone").touch()


@pytest.fixture(scope="module")
def runs(single, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    stopped_at_step_4(single, folder / "one_to_four")
    stopped_at_step_4(single, folder / "one_to_two_by_two")
    stopped_at_step_4(single, folder / "one_to_heads")
    shutil.copytree(single, folder / "same_on_four")
    shutil.copytree(single, folder / "same_by_heads")
    run_on_ranks(4, on_four_ranks, corpus, folder)

    stopped_at_step_4(folder / "four", folder / "four_to_two")
    stopped_at_step_4(single, folder / "one_to_two_spans")
    stopped_at_step_4(folder / "one_to_heads", folder / "heads_to_spans")
    damaged = shutil.copytree(single, folder / "damaged") / LAST / "tokenizer.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"a", b"b", 1))
    run_on_ranks(2, on_two_ranks, corpus, folder)

    for several, one in (
        ("one_to_two_by_two", "two_by_two_to_one"),
        ("one_to_two_spans", "two_spans_to_one"),
        ("one_to_heads", "heads_to_one"),
    ):
        train(corpus, stopped_at_step_4(folder / several, folder / one), LOSS_FREE)
    dist.destroy_process_group()
    return folder


@pytest.mark.parametrize(
    "name",
    "four one_to_four one_to_two_by_two one_to_heads four_to_two one_to_two_spans heads_to_spans two_by_two_to_one "
    "two_spans_to_one heads_to_one".split(),
)
def test_any_ranks_go_on_from_any(name, single, runs):
    for ours, theirs in zip(records(runs / name), records(single), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert ours["moe/0/load"] == theirs["moe/0/load"]


def test_ranks_share_the_checking_and_agree(runs):
    assert sorted(path.name for path in runs.glob("refused_*")) == ["refused_0", "refused_1"]


def test_a_rank_that_is_gone_at_start_up(runs):
    assert (runs / "left_alone").exists()


@pytest.mark.parametrize("max_shard", ["5", "0.0006"])
def test_export_does_not_tell_the_ranks(max_shard, single, runs, tmp_path):
    assert len(list((runs / "same_on_four" / LAST).glob("*.safetensors"))) == 4
    folders = {"one": single, "four": runs / "same_on_four", "heads": runs / "same_by_heads"}
    contents = []
    for name, folder in folders.items():
        export.main(["--checkpoint", str(folder), "--output", str(tmp_path / name), "--max-shard-gib", max_shard])
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1] == contents[2]
    assert ("model.safetensors" in contents[0]) == (max_shard == "5")
    assert ("model.safetensors.index.json" in contents[0]) == (max_shard != "5")
