"""Modules from outside of the repository: what they register works as ours does."""

import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest

import train
from tests.parallel.parity import assert_layouts_equal_one_process
from tests.programs import run_program
from tests.test_docs import code_of_the_exercise
from torchlmoe import export, generate
from torchlmoe.checkpoint import open_model
from torchlmoe.config.load import ConfigError, load_config
from torchlmoe.data.readers import READERS
from torchlmoe.feed_forwards import FEED_FORWARDS
from torchlmoe.layers.losses import LOSSES
from torchlmoe.mixers import MIXERS
from torchlmoe.optim import OPTIMIZERS
from torchlmoe.registry import Registry

OTHERS = """
import math
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field

from torchlmoe.data.readers import READERS
from torchlmoe.feed_forwards import FEED_FORWARDS, FeedForward
from torchlmoe.layers.cross_entropy import linear_cross_entropy
from torchlmoe.layers.initialization import normal_
from torchlmoe.layers.linear import ColumnLinear, RowLinear
from torchlmoe.layers.losses import LOSSES
from torchlmoe.optim import OPTIMIZERS


@FEED_FORWARDS.register("squared_relu")
class SquaredReLU(FeedForward):
    def __init__(self, dim: int, *, hidden_dim: Annotated[int, Field(ge=1, description="Hidden width.")] = 24):
        super().__init__()
        self.up_proj, self.down_proj = ColumnLinear(dim, hidden_dim), RowLinear(hidden_dim, dim)

    def forward(self, x, *, sequence):
        return self.down_proj(self.up_proj(x).relu().square())

    def init_weights(self):
        for projection in (self.up_proj, self.down_proj):
            normal_(projection.weight, 0.02)

    def flops_per_token(self):
        return 4 * self.up_proj.weight.numel()


@LOSSES.register("scaled")
def scaled(hidden, weight, labels, *, chunk_size: int, factor: Annotated[float, Field(ge=0.1, le=10)] = 1.0):
    return factor * linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)


@OPTIMIZERS.register("signs")
def signs(parameters, *, lr: float, inertia: Annotated[float, Field(ge=0, lt=1, description="Of the sign.")] = 0.9):
    return torch.optim.SGD(parameters.every, lr=lr, momentum=inertia)


@READERS.register("counting")
def read(*, documents: Annotated[int, Field(ge=1, description="How many.")] = 100) -> Iterator[str]:
    for number in range(documents):
        yield f"{number} and {number + 1} are {2 * number + 1}. " * 5
"""
MODEL = """--model.dim 32 --model.num_layers 2 --model.layer_pattern LN --model.num_heads 2
--model.layers.L.mixer gated_retention --model.layers.L.gate_normalizer 8.0
--model.layers.L.mlp squared_relu --model.layers.L.mlp_options.hidden_dim 20 --model.layers.N.mlp none"""
RUN = f"""{MODEL} --job.custom_modules my_package.gated_retention,my_package.others --training.seq_len 32
--training.local_batch_size 2 --training.loss scaled --training.loss_options.factor 2.0 --optimizer.name signs
--optimizer.options.inertia 0.5 --data.dataset counting --data.reader_options.documents 200 --validation.max_batches 1
--checkpoint.enable true --checkpoint.interval 2 --metrics.plot false --metrics.log_freq 1"""


@pytest.fixture(scope="module", autouse=True)
def _registries():
    """As they were, for the tests after these."""
    registries = (MIXERS, FEED_FORWARDS, LOSSES, OPTIMIZERS, READERS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The exercise's mixer with the lines that register it, and one of each other kind, in a separate package."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "my_package").mkdir()
    file, *_, imports, registered, _ = code_of_the_exercise()
    decorator, line = registered.splitlines()
    code = re.sub(
        "^from torchlmoe.mixers.recurrent", f"{imports.strip()}\nfrom torchlmoe.mixers.recurrent", file, flags=re.M
    )
    assert line in code
    (folder / "my_package" / "gated_retention.py").write_text(code.replace(line, f"{decorator}\n{line}"))
    (folder / "my_package" / "others.py").write_text(OTHERS)
    return folder


def programs(arguments):
    """The programs one after another in one process, whose working directory is the first argument."""
    folder, steps, *rest = arguments
    os.chdir(folder)
    dump = ["--job.dump_folder", "run", "--data.cache_dir", "cache"]
    if steps == "0":
        train.main(["--help", *rest])
        generate.main(["--checkpoint", "run", "--prompt", "1 and", "--max-new-tokens", "5"])
        export.main(["--checkpoint", "run", "--output", "exported"])
        return
    train.main([*rest, *dump, "--training.steps", steps])


def test_what_is_registered_works_as_ours(package, tmp_path, monkeypatch):
    def run(steps, name):
        result = run_program(programs, [str(package), steps, *RUN.split()], tmp_path / name)
        assert result.returncode == 0, result.stderr
        return result

    first = run("2", "first")
    assert "val_loss" in (package / "run" / "metrics.jsonl").read_text()
    assert "modules: my_package.gated_retention, my_package.others" in first.stdout
    run("4", "resumed")
    steps = [line.split(",")[0] for line in (package / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in (1, 2, 3, 4)]
    printed = run("0", "others").stdout
    for setting in (
        "layers.<letter>.gate_normalizer",
        "mlp_options.hidden_dim",
        "training.loss_options.factor",
        "optimizer.options.inertia",
        "data.reader_options.documents",
    ):
        assert setting in printed
    assert "1 and" in printed
    # Once registered, in this process too: a checkpoint and an export name what they need.
    monkeypatch.syspath_prepend(str(package))
    for folder in ("run", "exported"):
        model, config, _ = open_model(package / folder)
        assert type(model.blocks["0"].mixer).__name__ == "GatedRetention"
        assert config.job.custom_modules == ["my_package.gated_retention", "my_package.others"]
    with pytest.raises(ConfigError, match=r"mlp_options.hidden_width is not a setting; the nearest is hidden_dim"):
        load_config([*RUN.split(), "--model.layers.L.mlp_options.hidden_width", "3"])
    with pytest.raises(ConfigError, match=r"optimizer.momentum = 0.5 has no effect with optimizer.name = 'signs'"):
        load_config([*RUN.split(), "--optimizer.momentum", "0.5"])
    with pytest.raises(ConfigError, match=r"optimizer.options.inertia = 1.5"):
        load_config([*RUN.split(), "--optimizer.options.inertia", "1.5"])


def find_modules_in(folder):
    sys.path.append(folder)


def test_the_exercise_is_right_under_tensor_and_context_parallelism(package, corpus, tmp_path):
    """Its mixer has no line about either; the feed-forward beside it neither."""
    flags = f"{MODEL} --job.custom_modules my_package.gated_retention,my_package.others --model.num_layers 2"
    variants = {"outside": f"{flags} --training.global_batch_size 3 --training.local_batch_size 3"}
    layouts = {
        2: {
            name: (variants, f"--parallelism.{name}_parallel_degree 2 --parallelism.data_parallel_shard_degree 1")
            for name in ("tensor", "context")
        }
    }
    find = partial(find_modules_in, str(package))
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=3, float32=None, setup=find)


def test_modules_that_cannot_be_imported(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="names 'no_such_module', which cannot be imported: ModuleNotFoundError"):
        load_config(["--job.custom_modules", "no_such_module"])
    with pytest.raises(ConfigError, match="must be a list of names"):
        load_config(["--job.custom_modules", "[1]"])
    (tmp_path / "broken_module.py").write_text("import torchlmoe\nraise RuntimeError('not today')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="RuntimeError: not today; install it"):
        load_config(["--job.custom_modules", "broken_module"])


def test_what_comes_with_weights_is_never_run(tmp_path, monkeypatch):
    """A module in the folder of an export, which is also where Python looks for modules."""
    from torchlmoe.config.load import config_from

    (tmp_path / "evil_module.py").write_text("import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="code that comes with weights is never run"):
        config_from([{"job": {"custom_modules": ["evil_module"]}}], Path(tmp_path))
    assert not (tmp_path / "evil_module.ran").exists()
    assert "evil_module" not in sys.modules


def test_a_name_is_given_once():
    registry = Registry("Mixer", {"gla": MIXERS["gla"]})
    registry.register("gla")(MIXERS["gla"])
    with pytest.raises(ValueError, match=r"'gla' is already registered by torchlmoe.mixers.gla.GatedLinearAttention"):
        registry.register("gla")(MIXERS["bla"])
