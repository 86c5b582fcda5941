"""Trains one small model under many layouts of gloo processes and compares each run with that of one process."""

import faulthandler
import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from tests.conftest import SECONDS_OF_A_HANG, run_on_ranks
from torchlmoe.config.load import load_config
from torchlmoe.config.settings import Config
from torchlmoe.training.trainer import Trainer

SETTINGS = """--model.dim 32 --model.num_layers 4 --model.num_heads 2 --moe.num_experts 8 --moe.top_k 2
--moe.expert_dim 16 --training.seq_len 48 --training.local_batch_size 1 --training.global_batch_size 4
--training.device cpu --training.steps 20 --optimizer.lr 1e-3 --validation.interval 10 --validation.max_batches 1
--metrics.log_freq 1 --metrics.plot false --metrics.tensorboard false""".split()

LOSSES = ("loss", "val_loss", "val_bits_per_byte")

VARIANTS_OF_A_PROCESS = 16
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
        for batch in _batches(jobs):
            run_on_ranks(world_size, train_layouts, batch, corpus, folder, steps, float32 and tuple(float32), setup)
        for name, (each, _) in jobs.items():
            _assert_same_runs(folder / name, folder / "whole", each, steps)


def _batches(jobs: dict[str, tuple[Variants, str]]) -> list[dict[str, tuple[Variants, str]]]:
    """Cut the runs of some layouts into batches, each for new processes: the threads of process groups add up."""
    batches: list[dict[str, tuple[Variants, str]]] = []
    runs = [(layout, variant) for layout, (variants, _) in jobs.items() for variant in variants]
    for start in range(0, len(runs), VARIANTS_OF_A_PROCESS):
        batch: dict[str, tuple[Variants, str]] = {}
        for layout, variant in runs[start : start + VARIANTS_OF_A_PROCESS]:
            variants, flags = jobs[layout]
            batch.setdefault(layout, ({}, flags))[0][variant] = variants[variant]
        batches.append(batch)
    return batches


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_layouts(jobs, corpus: Path, folder: Path, steps: int, float32: tuple[str, ...] | None, setup=None) -> None:
    """On each process: every variant of every layout of this number of processes, in folder/layout/variant."""
    if setup is not None:
        setup()
    data = ["--data.dataset", str(corpus), "--data.cache_dir", f"{corpus}/cache"]
    for layout, (variants, layout_flags) in jobs.items():
        for name, flags in variants.items():
            arguments = [*SETTINGS, *data, *flags.split(), *layout_flags.split(), "--training.steps", str(steps)]
            for dtype in ("float64", "float32") if float32 is None or name in float32 else ("float64",):
                faulthandler.dump_traceback_later(SECONDS_OF_A_HANG, exit=True)  # of this run, not of all together
                run = folder / layout / (name if dtype == "float64" else f"{name}_float32")
                more = ["--job.dump_folder", str(run), "--training.dtype", dtype]
                if dtype == "float32":  # whose norm of gradients has fewer digits than what is compared
                    more += ["--training.max_norm", "1e9"]
                _train(load_config([*arguments, *more]), run / "first_step.pt")
                _leave_groups()


def _train(config: Config, path: Path) -> None:
    """Train, in float32 for one step only, and save the gradients of the first step."""
    trainer = Trainer(config)
    first_step = _gradients_of_the_next_step(trainer)
    if config.training.dtype == "float64":
        trainer.train()
    else:
        first_step["loss"] = trainer.train_step(0)[0][0]
        trainer.loader.close()
    parts = [None] * trainer.world_size  # a stage of a pipeline has some of the parameters
    dist.all_gather_object(parts, first_step if trainer.ranks.row_index == 0 else {})
    if trainer.rank == 0:
        torch.save({name: value for part in parts for name, value in part.items()}, path)


def _leave_groups() -> None:
    """End the groups of a run: each has its own threads, and those of dozens of runs slow a machine down."""
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    _clear_sharding_prop_cache()  # has meshes of these groups, to which those of the next run are equal
    gc.collect()


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


@dataclass(frozen=True)
class Differences:
    """Between a run and that of one process, relative and at most over all steps. Less than 1e-12 counts as none.

    loss: of training and validation losses and balance losses. loads_equal: whether every layer's load and drops are.
    first_gradients: by run (in float64, and with the ending _float32 in float32) of any parameter of the first step,
        relative to its norm or, if that is more, to a thousandth of the whole gradient's. first_float32_loss: of the
        first step in float32.
    """

    loss: float
    grad_norm: float
    loads_equal: bool
    first_gradients: dict[str, float]
    first_float32_loss: float


def differences(folder: Path, reference: Path, name: str, steps: int) -> Differences:
    """Of the run folder/name from reference/name."""
    found, expected = records(folder / name), records(reference / name)
    assert [record["step"] for record in found] == [record["step"] for record in expected] == list(range(1, steps + 1))
    assert "val_loss" in expected[-1]
    of_loss, of_norm, loads_equal = 0.0, 0.0, True
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key in LOSSES or key.endswith(("/aux_loss", "/z_loss")):
                of_loss = max(of_loss, _relative(ours[key], value))
            elif key.endswith(("/load", "/dropped_fraction", "/load_max_over_mean")):
                loads_equal &= ours[key] == value
        of_norm = max(of_norm, _relative(ours["grad_norm"], theirs["grad_norm"]))
    of_first, of_float32 = {}, 0.0
    for run in (name, f"{name}_float32"):
        if (reference / run).exists():
            first, expected_first = (torch.load(each / run / "first_step.pt") for each in (folder, reference))
            if "loss" in expected_first:
                of_float32 = _relative(first.pop("loss").item(), expected_first.pop("loss").item())
            assert first.keys() == expected_first.keys()
            whole = torch.stack([gradient.norm() for gradient in expected_first.values()]).norm()
            of_first[run] = max(
                ((first[key] - gradient).norm() / max(gradient.norm(), 1e-3 * whole)).item()
                for key, gradient in expected_first.items()
            )
    return Differences(of_loss, of_norm, loads_equal, of_first, of_float32)


def _relative(ours: float, theirs: float) -> float:
    difference = abs(ours - theirs)
    return 0.0 if difference <= 1e-12 else difference / max(abs(theirs), 1e-300)


def _assert_same_runs(folder: Path, reference: Path, variants: Iterable[str], steps: int) -> None:
    for name in variants:
        difference = differences(folder, reference, name, steps)
        # ReBased divides by sums that come close to zero: where these are taken in another order, even in one process
        # by another backend, the gradient's norm differs by 1e-6.
        is_rebased = "rebased" in name
        assert difference.loss <= 1e-9, (name, difference)
        assert difference.grad_norm <= (1e-5 if is_rebased else 1e-9), (name, difference)
        assert difference.loads_equal, name
        for run, error in difference.first_gradients.items():
            limit = 1e-5 if is_rebased or run.endswith("_float32") else 1e-9
            if is_rebased and run.endswith("_float32"):
                limit = 1e-4
            assert error <= limit, (run, difference)
        assert difference.first_float32_loss <= 1e-6, (name, difference)
