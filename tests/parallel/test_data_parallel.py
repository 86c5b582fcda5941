"""FSDP2 on 2 and 4 gloo processes equals the single process: losses, load counts, gradients, weights, validation."""

import pytest
import torch

from tests.conftest import run_on_ranks
from tests.parallel.parity import SETTINGS, assert_layouts_equal_one_process, records
from torchlmoe.config.load import load_config
from torchlmoe.mixers import MIXERS
from torchlmoe.training.trainer import Trainer

# What could depend on how a step is cut into ranks and microbatches.
CUT_VARIANTS = {
    "loss_free": "--moe.balance loss_free --moe.bias_update_rate 0.1 --moe.score_function sigmoid",
    "global_batch": "--moe.aux_loss_scope global_batch --moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.01",
    "tied": "--model.tie_embeddings true --moe.num_shared_experts 1",
    "muon": "--optimizer.name muon --optimizer.matrix_lr 1e-2",
    "dense": "--model.layers.L.mlp dense --model.layers.N.mlp dense",
}
EVERY_MIXER = {mixer: f"--model.mixer {mixer} --model.layer_pattern LLLN" for mixer in MIXERS}
# A common parameter (hgrn2), a value that blocks pass on (rwkv7), balanced memories (mom).
SOME_MIXERS = {
    mixer: f"--model.mixer {mixer} --model.layer_pattern LLN --model.num_layers 3"
    for mixer in ("gated_deltanet", "hgrn2", "rwkv7", "mom")
}
TWO_BLOCKS = "--model.layer_pattern LN --model.num_layers 2"
REPLICAS = "--parallelism.data_parallel_replicate_degree 2"


def test_ranks_equal_the_single_process(corpus, tmp_path):
    cut_variants = {name: f"{flags} {TWO_BLOCKS}" for name, flags in CUT_VARIANTS.items()}
    layouts = {2: {"fsdp": (cut_variants, "")}, 4: {"hsdp": (SOME_MIXERS, REPLICAS)}}
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=2, float32=["gated_deltanet"])

    for world_size in (1, 2):
        folder = tmp_path / f"bfloat16_{world_size}"
        run_on_ranks(world_size, train_in_bfloat16, str(corpus), str(folder))
        for ours, theirs in zip(records(folder), records(tmp_path / "whole" / "gated_deltanet"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.long
def test_every_mixer_and_more_steps(corpus, tmp_path):
    layouts = {
        2: {"fsdp": (CUT_VARIANTS | EVERY_MIXER, "")},
        4: {"fsdp": (CUT_VARIANTS, ""), "hsdp": (CUT_VARIANTS | EVERY_MIXER, REPLICAS)},
    }
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=20, float32=None)
    for name in CUT_VARIANTS | EVERY_MIXER:
        losses = [record["loss"] for record in records(tmp_path / "whole" / name)]
        assert losses[-1] < losses[0] - 0.05, name


def train_in_bfloat16(corpus: str, folder: str) -> None:
    """Masters and islands stay in float32."""
    data = ["--data.dataset", corpus, "--data.cache_dir", f"{corpus}/cache", "--job.dump_folder", folder]
    flags = [*SOME_MIXERS["gated_deltanet"].split(), "--training.steps", "2", "--training.dtype", "bfloat16"]
    trainer = Trainer(load_config([*SETTINGS, *data, *flags]))
    used = {}
    for block in trainer.model.blocks.values():
        for name, module in block.named_modules():
            if getattr(module, "float32_island", False):
                module.register_forward_hook(
                    lambda module, *_, name=name: used.update({name: {p.dtype for p in module.parameters()}})
                )
    trainer.train()
    assert used.keys() == {"mixer.decay", "feed_forward.router"}
    assert all(dtypes == {torch.float32} for dtypes in used.values())
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
