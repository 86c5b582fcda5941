"""FSDP2 on 2 and 4 gloo processes equals the single process: losses, load counts, gradients, weights, validation."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.conftest import run_on_ranks
from torchlmoe.config_loader import load_config
from torchlmoe.mixers import MIXERS
from torchlmoe.training.trainer import Trainer

SETTINGS = """--model.dim 32 --model.num_layers 4 --model.num_heads 2 --moe.num_experts 8 --moe.top_k 2
--moe.expert_dim 16 --training.seq_len 48 --training.local_batch_size 1 --training.global_batch_size 4
--training.device cpu --training.steps 20 --optimizer.lr 1e-3 --validation.interval 10 --validation.max_batches 1
--metrics.log_freq 1 --metrics.plot false --metrics.tensorboard false""".split()
# What could depend on how a step is cut into ranks and microbatches.
CUT_VARIANTS = {
    "loss_free": "--moe.balance loss_free --moe.bias_update_rate 0.1 --moe.score_function sigmoid",
    "global_batch": "--moe.aux_loss_scope global_batch --moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.01",
    "tied": "--model.tie_embeddings true --moe.num_shared_experts 1",
    "muon": "--optimizer.name muon --optimizer.matrix_lr 1e-2",
    "dense": "--model.layers.L.mlp dense --model.layers.N.mlp dense",
}
VARIANTS = {**{mixer: f"--model.mixer {mixer} --model.layer_pattern LLLN" for mixer in MIXERS}, **CUT_VARIANTS}
HYBRID = "--parallelism.data_parallel_replicate_degree 2"


def train_all(corpus: str, folder: str, variants: dict[str, str], extra: str) -> None:
    """In float64 20 steps of each variant; in float32 the first step's loss and gradients of each."""
    for name, settings in variants.items():
        arguments = [
            *SETTINGS,
            "--data.dataset",
            corpus,
            "--data.cache_dir",
            f"{corpus}/cache",
            *settings.split(),
            *extra.split(),
        ]
        dump = ["--job.dump_folder", f"{folder}/{name}"]
        Trainer(load_config([*arguments, *dump, "--training.dtype", "float64"])).train()

        dump = ["--job.dump_folder", f"{folder}/{name}_float32"]
        trainer = Trainer(load_config([*arguments, *dump, "--training.dtype", "float32", "--training.max_norm", "1e9"]))
        gradients = {}
        trainer.optimizer.register_step_pre_hook(
            lambda *_, model=trainer.model, into=gradients: into.update(
                (name, p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone())
                for name, p in model.named_parameters()
            )
        )
        totals, _, _ = trainer.train_step(0)
        trainer.loader.close()
        if trainer.rank == 0:
            torch.save({"loss": totals[0], **gradients}, f"{folder}/{name}_float32/first_step.pt")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_runs(folder: Path, reference: Path, variants: Iterable[str]) -> None:
    """What `train_all` left of the variants: losses, figures and loads of every step, the first step's gradients."""
    for name in variants:
        found, expected = records(folder / name), records(reference / name)
        assert [record["step"] for record in found] == list(range(1, 21))
        for ours, theirs in zip(found, expected, strict=True):
            for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-9), (name, key)
            for key, value in theirs.items():
                if key.endswith(("/load", "/dropped_fraction", "/load_max_over_mean")):
                    assert ours[key] == value, (name, key)
                elif key.endswith(("/aux_loss", "/z_loss")):
                    assert ours[key] == pytest.approx(value, rel=1e-9), (name, key)
        first, expected_first = (torch.load(f / f"{name}_float32" / "first_step.pt") for f in (folder, reference))
        torch.testing.assert_close(first.pop("loss"), expected_first.pop("loss"), rtol=1e-6, atol=0)
        whole = torch.stack([gradient.norm() for gradient in expected_first.values()]).norm()
        for key, gradient in expected_first.items():
            assert (first[key] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * whole), (name, key)


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    run_on_ranks(1, train_all, str(corpus), str(folder), VARIANTS, "")
    return folder


@pytest.mark.parametrize(
    ("world_size", "variants", "extra"), [(2, CUT_VARIANTS, ""), (4, CUT_VARIANTS, ""), (4, VARIANTS, HYBRID)]
)
def test_ranks_equal_the_single_process(world_size, variants, extra, single, corpus, tmp_path):
    run_on_ranks(world_size, train_all, str(corpus), str(tmp_path), variants, extra)
    assert_same_runs(tmp_path, single, variants)


def test_training_lowers_the_loss(single):
    for name in VARIANTS:
        losses = [record["loss"] for record in records(single / name)]
        assert losses[-1] < losses[0] - 0.05, name


def train_in_bfloat16(corpus: str, folder: str) -> None:
    arguments = [
        *SETTINGS,
        "--data.dataset",
        corpus,
        "--data.cache_dir",
        f"{corpus}/cache",
        "--training.dtype",
        "bfloat16",
    ]
    trainer = Trainer(load_config([*arguments, "--job.dump_folder", folder]))
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_bfloat16_keeps_masters_and_islands_in_float32(world_size, corpus, single, tmp_path):
    run_on_ranks(world_size, train_in_bfloat16, str(corpus), str(tmp_path))
    for ours, theirs in zip(records(tmp_path), records(single / "gated_deltanet"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
