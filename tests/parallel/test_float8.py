"""Float8 linear layers: the rounding of the format, which layers have it, and training with it on one and two ranks."""

import logging

import pytest
import torch

from tests.conftest import run_on_ranks
from tests.parallel.parity import SETTINGS, records
from torchlmoe.config.load import load_config
from torchlmoe.config.settings import Float8
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.parallel.float8 import convert_to_float8
from torchlmoe.training.trainer import Trainer


def small_model():
    config = load_config(["--model.dim", "48", "--model.num_heads", "3", "--moe.num_shared_experts", "1"])
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
    convert_to_float8(model, Float8(enable=True, recipe=recipe), torch.device("cpu"))
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
        convert_to_float8(model, Float8(enable=True), torch.device("cpu"))
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


def train(corpus: str, folder: str) -> None:
    options = ["--data.dataset", corpus, "--data.cache_dir", f"{corpus}/cache", "--validation.enable", "false"]
    options += ["--training.dtype", "bfloat16", "--training.steps", "5"]
    float8 = "--float8.enable true"
    runs = {"plain": "", "float8": float8, "recomputed": f"{float8} --activation_checkpoint.mode full"}
    for name, extra in runs.items():
        Trainer(load_config([*SETTINGS, *options, *extra.split(), "--job.dump_folder", f"{folder}/{name}"])).train()


def test_trains_with_bfloat16_fsdp_and_recompute(corpus, tmp_path):
    run_on_ranks(2, train, str(corpus), str(tmp_path))
    plain, float8, recomputed = (
        [record["loss"] for record in records(tmp_path / name)] for name in ("plain", "float8", "recomputed")
    )
    assert recomputed == float8
    assert float8 == pytest.approx(plain, rel=1e-2)
    assert float8 != plain
