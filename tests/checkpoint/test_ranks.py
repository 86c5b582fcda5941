"""Checkpoints on 1, 2 and 4 gloo processes: from any to any, checked together, and exported as the same bytes.

A launch takes seconds, so that there is one for each number of ranks.
"""

import os
import shutil

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.conftest import (
    LOSS_FREE,
    arguments,
    assert_same_steps,
    exported,
    latest,
    stopped_at_step,
    tensors,
    train,
)
from tests.conftest import run_on_ranks
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

LAST = "checkpoints/step-00000008"
REPLICAS = "--parallelism.data_parallel_replicate_degree 2"
SPANS = "--parallelism.context_parallel_degree 2"
HEADS_AND_EXPERTS = "--parallelism.tensor_parallel_degree 2 --parallelism.expert_parallel_degree 2"
# Its lower bounds and the embedding are on both stages.
TIED = f"{LOSS_FREE} --model.mixer hgrn2 --model.layer_pattern LLN --model.num_layers 3 --model.tie_embeddings true"
STAGES = "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_split 1"
STAGES_AND_HEADS = f"{STAGES} --parallelism.tensor_parallel_degree 2"


def on_four_ranks(corpus, folder):
    train(corpus, folder / "four", LOSS_FREE)
    train(corpus, folder / "one_to_four", LOSS_FREE)
    train(corpus, folder / "one_to_two_by_two", f"{LOSS_FREE} {REPLICAS} --checkpoint.async_mode async")
    train(corpus, folder / "one_to_heads", f"{LOSS_FREE} {HEADS_AND_EXPERTS}")
    train(corpus, folder / "tied_to_stages_and_heads", f"{TIED} {STAGES_AND_HEADS} --checkpoint.interval 2")
    # Loaded and saved again without training.
    for name, settings in (
        ("same_on_four", LOSS_FREE),
        ("same_by_heads", f"{LOSS_FREE} {HEADS_AND_EXPERTS}"),
        ("tied_same_by_stages", f"{TIED} {STAGES_AND_HEADS}"),
    ):
        trainer = Trainer(load_config(arguments(corpus, folder / name, settings)))
        trainer.checkpointer.save(trainer.progress)
        trainer.loader.close()


def on_two_ranks(corpus, folder):
    train(corpus, folder / "four_to_two", LOSS_FREE)
    train(corpus, folder / "one_to_two_spans", f"{LOSS_FREE} {SPANS}")
    train(corpus, folder / "heads_to_spans", f"{LOSS_FREE} {SPANS} --parallelism.expert_parallel_degree 2")
    train(corpus, folder / "tied_to_stages", f"{TIED} {STAGES} --checkpoint.interval 1")
    if dist.get_rank() == 0:
        stopped_at_step(7, folder / "tied_to_stages", folder / "tied_to_spans")
    dist.barrier()
    train(corpus, folder / "tied_to_spans", f"{TIED} {SPANS}")
    with pytest.raises(ValueError, match="is damaged") as error:
        Trainer(load_config(arguments(corpus, folder / "damaged", LOSS_FREE)))
    assert "tokenizer.json" in str(error.value)
    (folder / f"refused_{dist.get_rank()}").touch()
    if dist.get_rank() == 1:
        os._exit(0)
    with pytest.raises(ConnectionError, match="Another rank ended during start-up"):
        Trainer(load_config(arguments(corpus, folder / "alone", f"{LOSS_FREE} --parallelism.timeout_seconds 60")))
    (folder / "left_alone").touch()


@pytest.fixture(scope="module")
def runs(single, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(corpus, folder / "tied", TIED)
    dist.destroy_process_group()
    stopped_at_step(4, folder / "tied", folder / "tied_to_stages_and_heads")
    shutil.copytree(folder / "tied", folder / "tied_same_by_stages")
    stopped_at_step(4, single, folder / "one_to_four")
    stopped_at_step(4, single, folder / "one_to_two_by_two")
    stopped_at_step(4, single, folder / "one_to_heads")
    shutil.copytree(single, folder / "same_on_four")
    shutil.copytree(single, folder / "same_by_heads")
    run_on_ranks(4, on_four_ranks, corpus, folder)

    stopped_at_step(4, folder / "four", folder / "four_to_two")
    stopped_at_step(6, folder / "tied_to_stages_and_heads", folder / "tied_to_stages")
    stopped_at_step(4, single, folder / "one_to_two_spans")
    stopped_at_step(4, folder / "one_to_heads", folder / "heads_to_spans")
    damaged = shutil.copytree(single, folder / "damaged") / LAST / "tokenizer.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"a", b"b", 1))
    run_on_ranks(2, on_two_ranks, corpus, folder)

    for several, one in (
        ("one_to_two_by_two", "two_by_two_to_one"),
        ("one_to_two_spans", "two_spans_to_one"),
        ("one_to_heads", "heads_to_one"),
    ):
        train(corpus, stopped_at_step(4, folder / several, folder / one), LOSS_FREE)
    dist.destroy_process_group()
    return folder


@pytest.mark.parametrize(
    "name",
    "four one_to_four one_to_two_by_two one_to_heads four_to_two one_to_two_spans heads_to_spans two_by_two_to_one "
    "two_spans_to_one heads_to_one tied_to_stages_and_heads tied_to_stages tied_to_spans".split(),
)
def test_any_ranks_resume_from_any(name, single, runs):
    assert_same_steps(runs / name, runs / "tied" if name.startswith("tied") else single)


def test_ranks_share_the_checking_and_agree(runs):
    assert sorted(path.name for path in runs.glob("refused_*")) == ["refused_0", "refused_1"]


def test_a_rank_that_is_gone_at_start_up(runs):
    assert (runs / "left_alone").exists()


@pytest.mark.parametrize("max_shard", ["5", "0.0006"])
def test_export_does_not_tell_the_ranks(max_shard, single, runs, tmp_path):
    assert len(list((runs / "same_on_four" / LAST).glob("*.safetensors"))) == 4
    for one, *several in (
        [single, runs / "same_on_four", runs / "same_by_heads"],
        [runs / "tied", runs / "tied_same_by_stages"],
    ):
        files = exported(one, tmp_path, max_shard)
        assert ("model.safetensors" in files) == (max_shard == "5")
        assert ("model.safetensors.index.json" in files) == (max_shard != "5")
        for run in several:
            assert exported(run, tmp_path, max_shard) == files
            torch.testing.assert_close(tensors(latest(run)), tensors(latest(one)), rtol=0, atol=0)
