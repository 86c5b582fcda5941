"""A block compiled as one graph equals the eager one, and neither new documents nor new lengths compile it anew."""

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from tests.conftest import run_on_ranks
from tests.parallel.parity import SETTINGS, records
from tests.parallel.small_blocks import PACKED, block_of, run
from torchlmoe.config.load import load_config
from torchlmoe.mixers import MIXERS
from torchlmoe.parallel import compile as compile_module
from torchlmoe.parallel.compile import compile_block, compile_blocks
from torchlmoe.parallel.precision import compute_in
from torchlmoe.parallel.recompute import recompute
from torchlmoe.training.trainer import Trainer


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def assert_equal(block, compiled, dtype, tolerance, graphs_at_each_step, **options):
    """aot_eager traces all that inductor would compile, without waiting for the C++ compiler."""
    compile_block(compiled, backend="aot_eager")
    for bounds, num_graphs in zip(PACKED, graphs_at_each_step, strict=True):
        found, expected = (run(each, bounds, dtype, **options) for each in (compiled, block))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert counters["stats"]["unique_graphs"] == num_graphs


# A mixer of every operation, and those that hand something on; the others differ in what they project.
ONE_OF_EACH = ("gla", "gated_deltanet", "rwkv7", "mom", "s4", "mamba", "ttt", "attention")
REST = [pytest.param(mixer, marks=pytest.mark.long) for mixer in MIXERS if mixer not in ONE_OF_EACH]


@pytest.mark.parametrize("mixer", [*ONE_OF_EACH, *REST])
def test_every_mixer_is_one_graph(mixer):
    """Of lengths that are said to vary, which saves the test a second graph."""
    block, compiled = (block_of(mixer, "dense") for _ in range(2))
    # The balance loss of memories takes the length of a row, a number, which varies from its second value on.
    graphs = (1, 1, 2, 2) if mixer == "mom" else (1, 1, 1, 1)
    assert_equal(block, compiled, torch.float64, 1e-12, graphs, lengths_vary=True)


@pytest.mark.parametrize("mode", ["none", pytest.param("selective", marks=pytest.mark.long), "full"])
def test_experts_bfloat16_and_recompute(mode):
    """In bfloat16 on a CPU the experts' runs are filled up, by a number that depends on the choices."""
    block, compiled = (block_of("gated_deltanet", dtype=torch.float32, num_shared_experts=1) for _ in range(2))
    if mode != "none":
        recompute(compiled, mode)
    for each in (block, compiled):
        compute_in(torch.bfloat16, each)
    # The second graph is for all lengths.
    assert_equal(block, compiled, torch.bfloat16, 1e-2, (1, 1, 2, 2))


def test_equal_blocks_share_their_graph():
    blocks = [block_of("bla", "dense", torch.float32) for _ in range(3)]
    for block in blocks:
        recompute(block, "full")
        compute_in(torch.bfloat16, block)
        compile_block(block, backend="aot_eager")
        run(block, PACKED[0], torch.bfloat16)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("mode", "is_compiled"), [("selective", False), ("full", True)])
def test_a_copy_computes_with_its_own_parameters(mode, is_compiled):
    """As `AveragedModel` needs it: the copy's weights change, and it must notice; gradients reach the copy alone."""
    block, plain = block_of("bla"), block_of("bla")
    recompute(block, mode)
    if is_compiled:
        compile_block(block, backend="aot_eager")
    copied = copy.deepcopy(block)
    for each in (copied, plain):
        for parameter in each.parameters():
            parameter.data.mul_(1.5)
    found, expected = (run(each, PACKED[0], torch.float64) for each in (copied, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in block.parameters())


def train_compiled(corpus: str, folder: str) -> None:
    options = ["--data.dataset", corpus, "--data.cache_dir", f"{corpus}/cache", "--validation.enable", "false"]
    options += "--model.num_layers 1 --model.layer_pattern L --model.mixer bla --training.steps 3".split()
    for name, extra in (("eager", ""), ("compiled", "--compile.enable true --activation_checkpoint.mode selective")):
        Trainer(load_config([*SETTINGS, *options, *extra.split(), "--job.dump_folder", f"{folder}/{name}"])).train()


def test_two_ranks_compiled_by_inductor_and_recomputed(corpus, tmp_path):
    run_on_ranks(2, train_compiled, str(corpus), str(tmp_path))
    eager, compiled = (records(tmp_path / name) for name in ("eager", "compiled"))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["moe/0/load"] == theirs["moe/0/load"]


def train_bfloat16(corpus: str, folder: str) -> None:
    """With float32 islands, which are not an FSDP group: its hooks would be within a block."""
    compile_module.compile_block = partial(compile_block, backend="aot_eager")
    options = ["--data.dataset", corpus, "--data.cache_dir", f"{corpus}/cache", "--validation.enable", "false"]
    options += "--model.num_layers 1 --model.layer_pattern L --training.steps 3 --training.dtype bfloat16".split()
    for name, extra in (("eager", ""), ("compiled", "--compile.enable true --activation_checkpoint.mode selective")):
        Trainer(load_config([*SETTINGS, *options, *extra.split(), "--job.dump_folder", f"{folder}/{name}"])).train()


def test_two_ranks_compiled_in_bfloat16(corpus, tmp_path):
    run_on_ranks(2, train_bfloat16, str(corpus), str(tmp_path))
    eager, compiled = (records(tmp_path / name) for name in ("eager", "compiled"))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


EVERY_RECURRENCE = ("gla", "gated_deltanet", "mamba", "ttt", "attention", "mom")
HEADS_AND_EXPERTS = "--parallelism.tensor_parallel_degree 2 --parallelism.expert_parallel_degree 2"


def train_every_recurrence(corpus: str, folder: str) -> None:
    options = ["--data.dataset", corpus, "--data.cache_dir", f"{corpus}/cache", "--validation.enable", "false"]
    options += f"--model.num_layers 1 --model.layer_pattern L --training.dtype float64 {HEADS_AND_EXPERTS}".split()
    for mixer in EVERY_RECURRENCE:
        for name, extra in (("eager", ""), ("compiled", "--compile.enable true")):
            flags = [*extra.split(), "--model.mixer", mixer, "--job.dump_folder", f"{folder}/{name}_{mixer}"]
            trainer = Trainer(load_config([*SETTINGS, *options, *flags]))
            losses = []
            for step in range(10):
                torch._dynamo.config.error_on_recompile = step > 2
                losses.append(trainer.train_step(step)[0][0].item())
            torch._dynamo.config.error_on_recompile = False
            trainer.close()
            torch.save(losses, f"{folder}/{name}_{mixer}.pt")


@pytest.mark.long
def test_heads_and_experts_compiled_by_inductor(corpus, tmp_path):
    """Ten steps equal eager ones, and nothing is compiled again after the third."""
    run_on_ranks(2, train_every_recurrence, str(corpus), str(tmp_path))
    for mixer in EVERY_RECURRENCE:
        eager, compiled = (torch.load(tmp_path / f"{name}_{mixer}.pt") for name in ("eager", "compiled"))
        assert compiled == pytest.approx(eager, rel=1e-8), mixer


def test_without_a_compiler(monkeypatch):
    def get_cpp_compiler():
        raise compile_module.InvalidCxxCompiler

    monkeypatch.setattr(compile_module, "get_cpp_compiler", get_cpp_compiler)
    with pytest.raises(ValueError, match=r"compile.enable = true needs a C\+\+ compiler on a CPU, and none is found"):
        compile_blocks(None, torch.device("cpu"))
