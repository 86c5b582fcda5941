"""Trains one small model under many layouts of gloo processes and compares each run with that of one process."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.conftest import run_on_ranks
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

SETTINGS = """--model.dim 32 --model.num_layers 4 --model.num_heads 2 --moe.num_experts 8 --moe.top_k 2
--moe.expert_dim 16 --training.seq_len 48 --training.local_batch_size 1 --training.global_batch_size 4
--training.device cpu --training.steps 20 --optimizer.lr 1e-3 --validation.interval 10 --validation.max_batches 1
--metrics.log_freq 1 --metrics.plot false --metrics.tensorboard false""".split()

Variants = dict[str, str]  # name -> settings beyond SETTINGS
Layouts = dict[int, dict[str, tuple[Variants, str]]]  # number of processes -> name -> variants, settings of the layout


def assert_layouts_equal_one_process(
    layouts: Layouts, corpus: Path, folder: Path, *, steps: int, float32: Iterable[str] | None, setup=None
) -> None:
    """Trains every variant of every layout, and the same variants on one process in folder/whole.

    float32: the variants of which the first step is also taken in float32; None for all.
    setup: called on every process before anything else.
    """
    variants = {name: flags for jobs in layouts.values() for each, _ in jobs.values() for name, flags in each.items()}
    for world_size, jobs in ({1: {"whole": (variants, "")}} | layouts).items():
        run_on_ranks(world_size, _train, jobs, corpus, folder, steps, float32 and tuple(float32), setup)
        for name, (each, _) in jobs.items():
            _assert_same_runs(folder / name, folder / "whole", each, steps)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _train(jobs, corpus: Path, folder: Path, steps: int, float32: tuple[str, ...] | None, setup) -> None:
    if setup is not None:
        setup()
    data = ["--data.dataset", str(corpus), "--data.cache_dir", f"{corpus}/cache"]
    for layout, (variants, layout_flags) in jobs.items():
        for name, flags in variants.items():
            arguments = [*SETTINGS, *data, *flags.split(), *layout_flags.split(), "--training.steps", str(steps)]
            for dtype in ("float64", "float32") if float32 is None or name in float32 else ("float64",):
                run = folder / layout / (name if dtype == "float64" else f"{name}_float32")
                more = ["--job.dump_folder", str(run), "--training.dtype", dtype]
                if dtype == "float32":  # whose norm of gradients has fewer digits than what is compared
                    more += ["--training.max_norm", "1e9"]
                trainer = Trainer(load_config([*arguments, *more]))
                first_step = _gradients_of_the_next_step(trainer)
                if dtype == "float64":
                    trainer.train()
                else:
                    first_step["loss"] = trainer.train_step(0)[0][0]
                    trainer.loader.close()
                if trainer.rank == 0:
                    torch.save(first_step, run / "first_step.pt")


def _gradients_of_the_next_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    """By name, filled when the step is taken."""
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_) -> None:
        if not gradients:
            for name, parameter in trainer.model.named_parameters():
                gradient = parameter.grad
                gradients[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()

    trainer.optimizer.register_step_pre_hook(keep)
    return gradients


def _assert_same_runs(folder: Path, reference: Path, variants: Iterable[str], steps: int) -> None:
    """Losses, figures and loads of every step, and the first step's gradients."""
    for name in variants:
        found, expected = records(folder / name), records(reference / name)
        assert [record["step"] for record in found] == list(range(1, steps + 1))
        for ours, theirs in zip(found, expected, strict=True):
            for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
                if key in theirs:
                    # ReBased divides by sums that come close to zero: where these are taken in another order, even in
                    # one process by another backend, the gradient's norm differs by 1e-6.
                    tolerance = 1e-5 if key == "grad_norm" and "rebased" in name else 1e-9
                    assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (name, key)
            for key, value in theirs.items():
                if key.endswith(("/load", "/dropped_fraction", "/load_max_over_mean")):
                    assert ours[key] == value, (name, key)
                elif key.endswith(("/aux_loss", "/z_loss")):
                    assert ours[key] == pytest.approx(value, rel=1e-9), (name, key)
        assert "val_loss" in expected[-1]
        for run, tolerance in ((name, 1e-9), (f"{name}_float32", 1e-5)):
            if not (reference / run).exists():
                continue
            first, expected_first = (torch.load(each / run / "first_step.pt") for each in (folder, reference))
            if "loss" in expected_first:
                torch.testing.assert_close(first.pop("loss"), expected_first.pop("loss"), rtol=1e-6, atol=0)
            whole = torch.stack([gradient.norm() for gradient in expected_first.values()]).norm()
            for key, gradient in expected_first.items():
                limit = 1e-5 if "rebased" in name else tolerance
                error = (first[key] - gradient).norm() / max(gradient.norm(), 1e-3 * whole)
                assert error <= limit, (run, key, error)
