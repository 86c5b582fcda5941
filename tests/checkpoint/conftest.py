"""A small model's run, in this process or another, and what it leaves."""

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

SMALL = """--model.dim 32 --model.num_layers 2 --model.layer_pattern LN --model.num_heads 2 --moe.num_experts 4
--moe.top_k 2 --moe.expert_dim 16 --training.seq_len 32 --training.local_batch_size 1 --training.global_batch_size 4
--training.device cpu --training.steps 8 --metrics.log_freq 1 --metrics.plot false --metrics.tensorboard false
--validation.enable false --checkpoint.enable true --checkpoint.interval 4""".split()
# What a checkpoint holds beyond parameters and AdamW's moments: Muon's, the bias of loss-free balancing, the last
# step's loads.
LOSS_FREE = """--moe.balance loss_free --moe.score_function sigmoid --moe.bias_update_rate 0.1 --training.dtype float64
--optimizer.name muon"""
GLOBAL_BATCH = "--moe.aux_loss_scope global_batch --moe.aux_loss_weight 0.1 --training.deterministic true"


def arguments(corpus: Path, folder: Path, extra: str = "") -> list[str]:
    data = ["--data.dataset", str(corpus), "--data.cache_dir", f"{corpus}/cache"]
    return [*SMALL, *data, "--job.dump_folder", str(folder), *extra.split()]


def train(corpus: Path, folder: Path, extra: str = "") -> Trainer:
    """Trains in this process, on the rank that it is."""
    trainer = Trainer(load_config(arguments(corpus, folder, extra)))
    trainer.train()
    return trainer


def records(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("tokens_per_second", "mfu", "memory_gib")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def stopped_at_step_4(finished: Path, folder: Path) -> Path:
    """A copy of a run that was killed after step 8 was logged and before it was saved."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    return folder


@pytest.fixture
def process_group():
    """Ends the one that a Trainer of this process starts."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory) -> Path:
    """A float64 run of 8 steps (LOSS_FREE) with checkpoints at steps 4 and 8, by one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    train(corpus, folder, LOSS_FREE)
    dist.destroy_process_group()
    return folder
