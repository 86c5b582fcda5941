"""Trains under every layout and compares with one process: python -m tests.parity_matrix [--output docs/parity.md]

Each layout runs on gloo processes in float64 at a learning rate of 1e-3, and every step is compared with that of a run
of one process. The program ends with exit code 1 if a layout is not equal. The page also lists combinations that are
not supported, with their error messages.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import prod
from pathlib import Path

import torch
from rich.progress import track

from tests.conftest import run_on_ranks, write_corpus
from tests.parallel.parity import Differences, differences, train_layouts
from torchlmoe.config.batch import check_degrees
from torchlmoe.config.load import load_config
from torchlmoe.parallel.parallelize import whole_model

STEPS = 20
MOST_LOSS, MOST_NORM = 1e-9, 1e-8  # relative
TABLE = Path(__file__).parents[1] / "docs" / "parity.md"

_SHARED = "--model.num_heads 4 --training.global_batch_size 4"
_THREE = "--model.dim 48 --model.num_heads 3 --moe.num_experts 6 --training.global_batch_size 6"
# Models with the size of the debug model, and as many heads and experts as the layouts need.
MODELS = {
    "gated_deltanet": f"{_SHARED} --model.mixer gated_deltanet --activation_checkpoint.mode full",
    "gla, Muon": f"{_SHARED} --model.mixer gla --optimizer.name muon",
    "mamba2, tied": f"{_SHARED} --model.mixer mamba2 --model.tie_embeddings true --moe.aux_loss_scope global_batch",
    "rwkv7, tied": f"{_SHARED} --model.mixer rwkv7 --model.tie_embeddings true --moe.balance loss_free",
    "hgrn2, Muon, tied": f"{_SHARED} --model.mixer hgrn2 --optimizer.name muon --model.tie_embeddings true",
    "mom": f"{_SHARED} --model.mixer mom --activation_checkpoint.mode selective",
    "ttt": f"{_SHARED} --model.mixer ttt --moe.num_shared_experts 1",
    "attention": f"{_SHARED} --model.layer_pattern N --model.layers.N.mlp dense",
    "three heads": f"{_THREE} --model.mixer gated_deltanet",
    "three heads, Muon": f"{_THREE} --model.mixer hgrn2 --optimizer.name muon",
}
DEGREES = {
    "pp": "pipeline_parallel_degree",
    "replicas": "data_parallel_replicate_degree",
    "dp": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
}
OTHERS = {
    "interleaved": "--parallelism.pipeline_parallel_schedule Interleaved1F1B",
    "split": "--parallelism.pipeline_parallel_split",
    "ring": "--parallelism.lsm_context_parallel ring",
    "ulysses": "--parallelism.attention_context_parallel ulysses",
}


@dataclass(frozen=True)
class Layout:
    """name: degrees, such as "pp=2 tp=2 interleaved". models: names of the models that are trained."""

    name: str
    models: tuple[str, ...]

    @property
    def degrees(self) -> dict[str, int]:
        words = [word.partition("=") for word in self.name.split()]
        return {axis: int(degree) for axis, _, degree in words if axis in DEGREES}

    @property
    def world_size(self) -> int:
        return prod(degree for axis, degree in self.degrees.items() if axis != "ep")

    @property
    def flags(self) -> str:
        degrees = [f"--parallelism.{DEGREES[axis]} {degree}" for axis, degree in self.degrees.items()]
        words = [word.partition("=") for word in self.name.split()]
        return " ".join([*degrees, *(f"{OTHERS[word]} {value}" for word, _, value in words if word in OTHERS)])


LAYOUTS = [
    Layout(name, models)
    for name, *models in (
        # One axis.
        ("dp=2", "gated_deltanet"),
        ("replicas=2", "gla, Muon"),
        ("tp=2", "mamba2, tied"),
        ("tp=4", "attention"),
        ("cp=2", "gated_deltanet"),
        ("cp=2 ring ulysses", "gla, Muon"),
        ("cp=4", "mamba2, tied"),
        ("dp=2 ep=2", "gated_deltanet"),
        ("pp=2", "hgrn2, Muon, tied", "rwkv7, tied"),
        ("pp=4", "gated_deltanet"),
        ("pp=2 interleaved", "rwkv7, tied", "hgrn2, Muon, tied"),
        ("pp=2 split=1", "mom"),
        # Degrees of three.
        ("dp=3 ep=3", "three heads"),
        ("cp=3", "three heads, Muon"),
        ("tp=3", "three heads, Muon"),
        ("pp=3", "three heads"),
        # Pairs.
        ("replicas=2 dp=2", "mom"),
        ("dp=2 tp=2", "ttt"),
        ("dp=2 cp=2", "hgrn2, Muon, tied"),
        ("pp=2 dp=2", "rwkv7, tied"),
        ("pp=2 replicas=2", "gated_deltanet"),
        ("cp=2 tp=2", "gla, Muon"),
        ("pp=2 tp=2", "mamba2, tied"),
        ("pp=2 cp=2", "mom"),
        ("tp=2 ep=2", "gated_deltanet"),
        ("cp=2 ep=2", "ttt"),
        ("pp=2 dp=2 ep=2", "gla, Muon"),
        ("pp=3 dp=2", "three heads"),
        # Three and more.
        ("dp=2 cp=2 ep=4", "mamba2, tied"),
        ("pp=2 cp=2 tp=2", "rwkv7, tied"),
        ("pp=2 dp=2 cp=2 ep=2", "hgrn2, Muon, tied"),
        ("cp=2 tp=2 ep=2", "gated_deltanet"),
        ("replicas=2 dp=2 tp=2 ep=2", "gla, Muon"),
        ("pp=2 cp=2 tp=2 ep=4", "gated_deltanet"),
        ("pp=2 dp=2 tp=2 ep=4", "mom"),
        ("pp=2 tp=2 interleaved", "ttt"),
        ("pp=2 cp=2 interleaved", "attention"),
        ("pp=2 cp=2 split=3", "hgrn2, Muon, tied"),
        ("pp=4 tp=2", "gla, Muon"),
    )
]
# Combinations that are not supported, with the number of ranks: each raises an error when the model is built.
REFUSED = {
    (2, "--parallelism.tensor_parallel_degree 2 --model.num_heads 3 --model.dim 48"): "heads that ranks cannot share",
    (
        4,
        "--parallelism.context_parallel_degree 2 --parallelism.tensor_parallel_degree 2 --model.num_heads 6 "
        "--model.dim 48 --parallelism.attention_context_parallel ulysses",
    ): "heads that Ulysses cannot spread",
    (3, "--parallelism.expert_parallel_degree 3"): "experts that ranks cannot share",
    (2, "--parallelism.expert_parallel_degree 2 --parallelism.pipeline_parallel_degree 2"): "ep without other ranks",
    (2, "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule ZBVZeroBubble"): (
        "a schedule that splits the backward"
    ),
    (8, "--parallelism.pipeline_parallel_degree 8 --training.global_batch_size 8"): "more stages than blocks",
    (2, "--parallelism.pipeline_parallel_degree 2 --training.global_batch_size 1"): "fewer microbatches than stages",
    (
        2,
        "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule Interleaved1F1B "
        "--training.global_batch_size 5",
    ): "microbatches in unequal rounds",
    (2, "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_split 2,3"): "stages without a rank",
    (2, "--parallelism.context_parallel_degree 2 --training.seq_len 9"): "tokens that ranks cannot share",
    (4, "--parallelism.context_parallel_degree 4 --training.seq_len 8"): "spans shorter than a convolution's reach",
    (2, "--parallelism.context_parallel_degree 2 --float8.enable true --training.seq_len 48"): (
        "products of float8 that are too short"
    ),
    (3, "--parallelism.pipeline_parallel_degree 3 --parallelism.data_parallel_shard_degree 2"): "ranks too many or few",
}


def train(layouts: Iterable[Layout], corpus: Path, folder: Path, steps: int, advance: Callable = list) -> None:
    """Train under the layouts in folder/layout/model, and on one process in folder/whole/model.

    advance: wraps the list of jobs, to show progress.
    """
    layouts = list(layouts)
    models = sorted({model for layout in layouts for model in layout.models})
    jobs = [("whole", 1, models, "")] + [(each.name, each.world_size, each.models, each.flags) for each in layouts]
    for name, world_size, of_layout, flags in advance(jobs):
        variants = {model: MODELS[model] for model in of_layout}
        run_on_ranks(world_size, _quietly, {name: (variants, flags)}, corpus, folder, steps)


def _quietly(*arguments) -> None:
    with redirect_stdout(StringIO()):  # hides what the runs print
        train_layouts(*arguments, float32=())


def is_equal(difference: Differences) -> bool:
    return difference.loss <= MOST_LOSS and difference.grad_norm <= MOST_NORM and difference.loads_equal


def refusal(flags: str, world_size: int) -> str:
    """Return the error message of a combination."""
    try:
        config = load_config(["--training.local_batch_size", "1", *flags.split()])
        check_degrees(config, world_size)
        whole_model(config, config.model.vocab_size or 4096, world_size)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{flags} on {world_size} ranks is not refused")


def _shown(difference: float) -> str:
    return f"{difference:.0e}" if difference else "< 1e-12"


def page(found: dict[tuple[str, str], Differences]) -> str:
    """Return the text of docs/parity.md. found: differences by layout and model."""
    lines = [
        "<!-- written by python -m tests.parity_matrix --output docs/parity.md: do not edit -->",
        "",
        "# Every layout against one process",
        "",
        f"`python -m tests.parity_matrix` trains each model for {STEPS} steps in float64 at a learning rate of 1e-3, "
        "on packed documents, under each layout and on one process. The table has the largest relative differences "
        f"over all steps, of losses (training, validation and balance; equal means at most {MOST_LOSS:g}) and of the "
        f"gradient norm (equal means at most {MOST_NORM:g}), and whether every expert had the same load in every step. "
        f"Processes run on CPUs and communicate by gloo. Made with torch {torch.__version__}, Python "
        f"{platform.python_version()}.",
        "",
        "Degrees are numbers of ranks: `pp` splits blocks into stages; `replicas` and `dp` (FSDP2) have different "
        "rows; `cp` splits tokens into spans; `tp` splits heads; `ep` splits experts, over ranks of `dp`, `cp` and "
        "`tp`. A microbatch is one row of 48 tokens.",
        "",
        "| layout | processes | model | loss | gradient norm | loads |",
        "|---|---|---|---|---|---|",
    ]
    sizes = {layout.name: layout.world_size for layout in LAYOUTS}
    for (layout, model), difference in found.items():
        figures = [
            _shown(difference.loss),
            _shown(difference.grad_norm),
            "equal" if difference.loads_equal else "differ",
        ]
        lines.append(f"| {layout} | {sizes[layout]} | {model} | {' | '.join(figures)} |")
    lines += ["", "## Not supported", "", "These raise an error when the model is built, the same on every rank:", ""]
    lines += [f'- {what}: "{refusal(flags, ranks)}"' for (ranks, flags), what in REFUSED.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the table to this file")
    parser.add_argument("--layouts", nargs="+", help="only these, as 'pp=2 tp=2'", choices=[x.name for x in LAYOUTS])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = [layout for layout in LAYOUTS if not arguments.layouts or layout.name in arguments.layouts]
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus")
        train(chosen, corpus, Path(folder), STEPS, lambda jobs: track(jobs, "layouts"))
        found = {
            (layout.name, model): differences(Path(folder) / layout.name, Path(folder) / "whole", model, STEPS)
            for layout in chosen
            for model in layout.models
        }
    text = page(found)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    if unequal := [key for key, difference in found.items() if not is_equal(difference)]:
        sys.exit(f"Not equal: {json.dumps(unequal)}")


if __name__ == "__main__":
    main()
