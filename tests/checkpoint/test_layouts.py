"""A run that changes its layout every two steps, and a checkpoint that is loaded and saved again under each."""

import os
import shutil
import signal

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.conftest import arguments, assert_same_steps, exported, latest, tensors
from tests.conftest import run_on_ranks
from tests.parity_matrix import Layout
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

LAYOUTS = [
    Layout(name, ())
    for name in (
        "",
        "pp=2",
        "tp=2",
        "cp=2",
        "pp=2 dp=2 ep=2",
        "pp=2 cp=2 interleaved",
        "replicas=2 dp=2 tp=2",
        "pp=3 split=1,2",
        "tp=3",
        "pp=2 cp=2 tp=2 ep=4",
        "cp=3 ep=3",
    )
]
STEPS_OF_A_LAYOUT = 2
STEPS = STEPS_OF_A_LAYOUT * len(LAYOUTS)
# Six heads and twelve experts divide by two and by three. What layers share is on several stages: RWKV-7's value of the
# first layer travels, HGRN2's lower bounds and the embedding are parameters of each.
SHARED = f"""--model.dim 48 --model.num_heads 6 --model.num_layers 4 --model.layer_pattern LLLN --moe.num_experts 12
--model.tie_embeddings true --training.seq_len 48 --training.global_batch_size 12 --training.dtype float64
--training.steps {STEPS} --optimizer.lr 1e-3 --checkpoint.interval 1000"""
RUNS = {
    "AdamW": f"{SHARED} --model.mixer rwkv7 --moe.aux_loss_scope global_batch",
    "Muon": f"{SHARED} --model.mixer hgrn2 --optimizer.name muon --moe.balance loss_free --checkpoint.async_mode async",
}


def same_under(layout, folder, name):
    return folder / "same" / f"{name} {layout.name}"


def on_ranks(layout, until, corpus, folder):
    for name, settings in RUNS.items():
        train_until(until, arguments(corpus, folder / "changing" / name, f"{settings} {layout.flags}"))
        same = same_under(layout, folder, name)
        trainer = Trainer(load_config(arguments(corpus, same, f"{settings} {layout.flags}")))
        assert trainer.progress.step == STEPS
        trainer.checkpointer.save(trainer.progress)
        trainer.checkpointer.wait()
        trainer.close()


def train_until(step, settings):
    trainer = Trainer(load_config(settings))

    def stop(*_):
        # A wish to stop is seen in the step after.
        if trainer.progress.step == step - 2 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.optimizer.register_step_post_hook(stop)
    trainer.train()
    assert trainer.progress.step == step


def on_one_process(corpus, folder):
    for name, settings in RUNS.items():
        Trainer(load_config(arguments(corpus, folder / "whole" / name, settings))).train()


@pytest.mark.long
def test_ten_changes_of_layout(corpus, tmp_path):
    run_on_ranks(1, on_one_process, corpus, tmp_path)
    for number, layout in enumerate(LAYOUTS, start=1):
        for name in RUNS:
            shutil.copytree(tmp_path / "whole" / name, same_under(layout, tmp_path, name))
        run_on_ranks(layout.world_size, on_ranks, layout, number * STEPS_OF_A_LAYOUT, corpus, tmp_path)
    for name in RUNS:
        whole = tmp_path / "whole" / name
        assert_same_steps(tmp_path / "changing" / name, whole)
        files, expected = exported(whole, tmp_path), tensors(latest(whole))
        for layout in LAYOUTS:
            same = same_under(layout, tmp_path, name)
            assert len(list(latest(same).glob("*.safetensors"))) == layout.world_size
            assert exported(same, tmp_path) == files, layout.name
            torch.testing.assert_close(tensors(latest(same)), expected, rtol=0, atol=0)
