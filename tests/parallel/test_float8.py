"""Float8: the formats' rounding, which layers have it, scales where ranks have parts, and training on 1 to 4 ranks."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.conftest import run_on_ranks
from tests.parallel.parity import SETTINGS, records
from torchlmoe.config.load import load_config
from torchlmoe.config.settings import Float8
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.ops.grouped_matmul import grouped_matmul
from torchlmoe.ops.mxfp8_matmul import mxfp8_grouped_matmul
from torchlmoe.parallel.float8 import convert_experts_to_mxfp8, convert_to_float8
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.parallel.tensor import apply_tensor_parallel, tensor_parallel_plan
from torchlmoe.styles.heads import read_local_parts
from torchlmoe.training.trainer import Trainer

CPU = torch.device("cpu")
TWO_RANKS = SimpleNamespace(size=lambda: 2)  # all that the choice of layers asks of a mesh


def small_model(flags="--model.dim 48 --model.num_heads 3 --moe.num_shared_experts 1"):
    config = load_config(flags.split())
    model = build_on_meta(config, vocab_size=64).to_empty(device="cpu")
    model.init_weights(seed=0)
    return model


def rounded(x, dim=None):
    """x as e4m3 stores it: scaled so that the largest magnitude (of each row along dim) is 448."""
    scale = 448.0 / (x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)).double()
    if dim is not None:  # row-wise scales are powers of two
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x * scale.float()).to(torch.float8_e4m3fn).double() / scale


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_products_have_the_rounding_of_the_format(recipe):
    model = small_model()
    exact = model.blocks["0"].mixer.q_proj
    convert_to_float8(model, Float8(enable=True, recipe=recipe), CPU)
    layer = model.blocks["0"].mixer.q_proj
    assert layer is not exact
    assert layer.weight is exact.weight
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    dim = -1 if recipe == "rowwise" else None
    expected = rounded(x, dim) @ rounded(exact.weight.detach(), dim).mT
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < 1e-6
    assert 1e-3 < (expected - exact(x)).norm() / exact(x).norm() < 2**-4


def test_what_is_left_out_is_said_once_by_name(caplog):
    model = small_model()
    names, weights = [name for name, _ in model.named_parameters()], model.state_dict()
    with caplog.at_level(logging.WARNING, logger="torchlmoe"):
        convert_to_float8(model, Float8(enable=True), CPU)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}
    converted = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    assert {"blocks.0.mixer.q_proj", "blocks.3.mixer.o_proj", "blocks.1.feed_forward.shared_expert.up_proj"} < converted
    assert not any(part in name for name in converted for part in ("router", "head", "decay", "a_proj", "b_proj"))
    said = [record.message for record in caplog.records if record.name.startswith("torchlmoe")]
    assert said[0] == "float8.recipe = 'tensorwise' is emulated on this device: float8's rounding, not its speed."
    assert said[1:] == [
        f"mixer.{name}_proj (48 x 3) of blocks 0, 1, 2 is not in float8: its widths are not multiples of 16."
        for name in "ba"
    ]
    assert [name for name, _ in model.named_parameters()] == names
    model.init_weights(seed=0)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_local_widths_decide(caplog):
    """48 hidden channels on two ranks are 24 on each; the one key head of 16 is whole on both."""
    flags = "--model.dim 32 --model.num_heads 2 --model.num_layers 1 --model.layer_pattern N --model.mlp_dim 48"
    model = small_model(f"{flags} --model.layers.N.mlp dense --model.layers.N.num_kv_heads 1")
    with caplog.at_level(logging.WARNING, logger="torchlmoe"):
        convert_to_float8(model, Float8(enable=True), CPU, TWO_RANKS)
    converted = {name for name, module in model.named_modules() if type(module).__name__ == "Float8LinearPart"}
    assert converted == {f"blocks.0.mixer.{name}_proj" for name in "qkvo"}
    reason = "of blocks 0 is not in float8: its widths on each of 2 ranks are not multiples of 16."
    assert [record.message for record in caplog.records if record.name.startswith("torchlmoe")][1:] == [
        f"feed_forward.{name}_proj ({widths}) {reason}"
        for name, widths in (("gate", "32 x 24"), ("up", "32 x 24"), ("down", "24 x 32"))
    ]


def test_hooks_and_attributes_stay():
    model, called = small_model(), []
    layer = model.blocks["0"].mixer.o_proj
    layer.register_forward_pre_hook(lambda *_, **__: called.append("before"), with_kwargs=True)
    handle = layer.register_forward_hook(lambda *_: called.append("after"))
    layer.note = "kept"
    convert_to_float8(model, Float8(enable=True), CPU)
    converted = model.blocks["0"].mixer.o_proj
    assert converted is not layer
    assert converted.note == "kept"
    converted(torch.ones(16, 48))
    handle.remove()
    converted(torch.ones(16, 48))
    assert called == ["before", "after", "before"]


def compare_parts_with_the_whole(recipe: str) -> None:
    """Outputs and gradients of layers whose heads and hidden channels are on two ranks."""
    flags = "--model.dim 64 --model.num_heads 4 --model.num_layers 2 --model.layer_pattern LN --model.mlp_dim 64"
    flags += " --model.mixer retention --model.layers.L.mlp dense --model.layers.N.mlp dense"
    start_process_group(CPU)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    settings = Float8(enable=True, recipe=recipe)
    whole, parts = small_model(flags), small_model(flags)
    convert_to_float8(whole, settings, CPU)
    plan = tensor_parallel_plan(parts, 2)
    convert_to_float8(parts, settings, CPU, mesh)
    apply_tensor_parallel(parts, plan, mesh)
    read_local_parts(parts)
    generator = torch.Generator().manual_seed(0)
    x, output_gradient = (torch.randn(1, 32, 64, generator=generator) for _ in range(2))
    sequence = SequenceLayout.of_rows(1, 32)
    rank = mesh.get_local_rank()
    for name in ("0.mixer", "0.feed_forward", "1.mixer", "1.feed_forward"):
        results = []
        for model in (whole, parts):
            layer = model.blocks.get_submodule(name)
            own = (lambda t: t) if model is whole else (lambda t: t.chunk(2, dim=1)[rank])
            ours = own(x).clone().requires_grad_()
            y = layer(ours, sequence=sequence)
            y.backward(own(output_gradient))
            found = {"output": y.detach(), "input's gradient": ours.grad}
            if model is whole:
                found = {key: value.chunk(2, dim=1)[rank] for key, value in found.items()}
            for parameter_name, parameter in layer.named_parameters():
                gradient = parameter.grad
                found[parameter_name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            results.append(found)
        expected, found = results
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            error = (found[key] - value).norm() / value.norm()
            assert error < 1e-5, (recipe, name, key, error)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_scales_of_parts_are_those_of_the_whole(recipe):
    """A scale of the part alone rounds all numbers otherwise: errors are 5% then. Scales of rows are powers of two."""
    run_on_ranks(2, compare_parts_with_the_whole, recipe)


def rounded_to_mxfp8(x):
    """x as MXFP8 has it: 32 numbers along the last dimension share the least power of two that keeps them under 448."""
    blocks = x.double().unflatten(-1, (-1, 32))
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / 448.0)))
    return ((blocks / scale).float().to(torch.float8_e4m3fn).double() * scale).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_products_have_the_rounding_of_mxfp8(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((100, 64), (4, 96, 64), (100, 96))
    x, weight, output_gradient = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    )
    ends = torch.tensor([37, 37, 99, 100], dtype=torch.int32)  # the second group is empty
    results = []
    for product in (grouped_matmul, mxfp8_grouped_matmul):
        y = product(x, weight, ends)
        results.append((y, *torch.autograd.grad(y, (x, weight), output_gradient)))
    for exact, low in zip(*results, strict=True):
        assert low.dtype is dtype
        assert 1e-2 < (low.double() - exact.double()).norm() / exact.double().norm() < 5e-2
    group = torch.bucketize(torch.arange(100), ends, right=True)
    expected = torch.einsum("md,mfd->mf", rounded_to_mxfp8(x.detach()), rounded_to_mxfp8(weight.detach())[group])
    assert (results[1][0].double() - expected).norm() / expected.norm() < 2**-8  # which bfloat16 rounds
    assert not results[1][2][1].any()


def test_grouped_products_of_no_rows_in_mxfp8():
    """As on a rank to which no token travels."""
    x, weight = torch.zeros(0, 64, requires_grad=True), torch.ones(4, 96, 64, requires_grad=True)
    y = mxfp8_grouped_matmul(x, weight, torch.zeros(4, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (0, 96)
    assert x.grad.shape == (0, 64)
    assert not weight.grad.any()


def test_mxfp8_is_refused_with_a_sentence(monkeypatch):
    def refusal(flags="", device=CPU, is_compiled=False):
        model = build_on_meta(load_config(flags.split()), vocab_size=64)
        with pytest.raises(ValueError, match=r"^float8\.experts = 'mxfp8' ") as caught:
            convert_experts_to_mxfp8(model, device, is_compiled)
        return str(caught.value).removeprefix("float8.experts = 'mxfp8' ")

    assert refusal("--moe.expert_dim 48") == (
        "needs widths that are multiples of 32, but the experts of model.layers.L have a width of 192 and a hidden "
        "width of 48; change model.dim or expert_dim, or leave it at 'none'."
    )
    assert "a width of 48 and a hidden width of 128;" in refusal("--model.dim 48 --model.num_heads 3")
    dense = "--model.layers.L.mlp dense --model.layers.N.mlp none"
    assert refusal(dense) == "has no effect on a model without routed experts; leave it at 'none'."
    assert refusal(is_compiled=True).endswith("which compile.enable = true cannot compile; leave one of the two off.")
    assert refusal(device=torch.device("cuda")) == (
        "needs a GPU of compute capability 10.0 and a torchao for CUDA 12.8 or later, which are not here; leave it at "
        "'none'."
    )
    monkeypatch.setitem(sys.modules, "torchao.prototype.moe_training.mxfp8_grouped_mm", None)
    assert refusal().startswith("needs torchao's prototype.moe_training, which torchao ")


def train(folder: str, steps: int, layout: str, runs: dict[str, str]) -> None:
    for name, flags in runs.items():
        arguments = f"{layout} --training.dtype bfloat16 --training.steps {steps} {flags}".split()
        Trainer(load_config([*SETTINGS, *arguments, "--job.dump_folder", f"{folder}/{name}"])).train()


def losses(folder, corpus, world_size, steps, layout, **runs):
    data = f"--data.dataset {corpus} --data.cache_dir {corpus}/cache --validation.enable false"
    run_on_ranks(world_size, train, str(folder), steps, f"{data} {layout}", runs)
    return [[record["loss"] for record in records(folder / name)] for name in runs]


def test_trains_with_bfloat16_fsdp_and_recompute(corpus, tmp_path):
    float8 = "--float8.enable true"
    plain, once, recomputed = losses(
        tmp_path, corpus, 2, 5, "", plain="", once=float8, recomputed=f"{float8} --activation_checkpoint.mode full"
    )
    assert recomputed == once
    assert once == pytest.approx(plain, rel=1e-2)
    assert once != plain


@pytest.mark.parametrize("steps", [10, pytest.param(100, marks=pytest.mark.long)])
def test_trains_with_parts_of_heads_and_experts(corpus, tmp_path, steps):
    """Linear layers in float8 and experts in MXFP8, on two ranks with parts of heads times two with other rows."""
    layout = "--model.num_layers 1 --moe.num_shared_experts 1 --moe.expert_dim 32 --training.global_batch_size 2"
    layout += " --parallelism.tensor_parallel_degree 2 --parallelism.expert_parallel_degree 2 --optimizer.lr 1e-2"
    plain, low = losses(tmp_path, corpus, 4, steps, layout, plain="", low="--float8.enable true --float8.experts mxfp8")
    assert len(low) == steps
    assert low != plain
    assert plain[-1] < 0.97 * plain[0]
    assert low[-1] == pytest.approx(plain[-1], rel=3e-2)
