"""A small model's run, in this process or another, and what it leaves."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import train as train_program
from tests.conftest import launcher
from tests.programs import Program
from torchlmoe import export
from torchlmoe.checkpoint.folders import published
from torchlmoe.checkpoint.state import load_tensors, saved_tensors
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


def assert_same_steps(folder: Path, reference: Path) -> None:
    """A float64 run's losses are those of another, within rounding, and so is every expert's load, exactly."""
    for ours, theirs in zip(records(folder), records(reference), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9), ours["step"]
        loads = [key for key in theirs if key.endswith("/load")]
        assert loads
        assert {key: ours[key] for key in loads} == {key: theirs[key] for key in loads}, ours["step"]


def latest(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return max(published(folder / "checkpoints").items())[1]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, each whole, also if several ranks saved its parts."""
    saved = saved_tensors(checkpoint).items()
    state = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in saved}
    load_tensors(state, checkpoint)
    return state


def exported(run: Path, folder: Path, max_shard_gib: str = "5") -> dict[str, bytes]:
    """The files that torchlmoe.export makes of a run's last checkpoint, in a folder below the given one."""
    output = folder / f"{run.name} as {max_shard_gib}"
    export.main(["--checkpoint", str(run), "--output", str(output), "--max-shard-gib", max_shard_gib])
    return {file.name: file.read_bytes() for file in output.iterdir()}


def stopped_at_step(step: int, run: Path, folder: Path) -> Path:
    """A copy of a run as if it had been killed before what came after this checkpoint was saved, though logged."""
    shutil.copytree(run, folder)
    for later, checkpoint in published(folder / "checkpoints").items():
        if later > step:
            shutil.rmtree(checkpoint)
    return folder


class Run:
    """train.py on some ranks, each a separate process, as by torchrun but without a launcher that stops them."""

    def __init__(self, corpus: Path, folder: Path, extra: str, world_size: int = 1, steps: int = 100_000):
        self.folder = folder
        self._store, place = launcher(world_size)
        settings = arguments(corpus, folder, f"--training.steps {steps} {extra}")
        self.ranks = [
            Program(
                train_program.main, settings, folder.parent, name=f"{folder.name}_{rank}",
                **(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}),
            )
            for rank in range(world_size)
        ]  # fmt: skip

    def wait_for_step(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        end = time.monotonic() + 120
        while not path.exists() or path.read_text().count("\n") < step:
            assert time.monotonic() < end
            assert all(rank.process.is_alive() for rank in self.ranks), self.ranks[0].result()
            time.sleep(0.05)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        for rank in self.ranks:
            rank.__exit__()


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
