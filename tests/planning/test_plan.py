"""python -m torchlmoe.plan: what it prints and writes, which layouts it finds, and what it refuses."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.programs import run_program
from torchlmoe.config.load import load_config
from torchlmoe.parallel import data
from torchlmoe.plan import main
from torchlmoe.planning.gpus import GPUS
from torchlmoe.planning.layout import make_plan
from torchlmoe.planning.search import legal_layouts

SMALL = """--model.layer_pattern LN --model.dim 32 --model.num_layers 2 --model.num_heads 2 --moe.num_experts 4
--moe.top_k 2 --moe.expert_dim 16 --model.vocab_size 64 --training.seq_len 32 --training.local_batch_size 2
--training.global_batch_size 16 --validation.enable false --data.tokenizer /nowhere/tokenizer.json""".split()
PIPELINE = ["--parallelism.pipeline_parallel_degree", "2"]


def test_prints_a_table_and_writes_json(capsys, tmp_path):
    file = tmp_path / "plan.json"
    main([*SMALL, *PIPELINE, "--world-size", "4", "--gpu", "a100", "--json", str(file)])
    printed, plan = capsys.readouterr().out, json.loads(file.read_text())
    assert list(plan) == [
        "world_size",
        "layout",
        "parameters",
        "active_parameters",
        "flops_per_rank",
        "seconds_per_step",
        "mfu",
        "bubble_fraction",
        "fits",
        "communication",
        "per_rank",
    ]
    assert plan["layout"] == {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "ep": 1}
    assert {key for message in plan["communication"] for key in message} == {"axis", "collective", "count", "bytes"}
    assert {"pp", "dp_shard"} <= {message["axis"].replace("_cp", "") for message in plan["communication"]}
    stages = plan["per_rank"]
    assert [stage["stage"] for stage in stages] == [0, 1]
    assert set(stages[0]) == {
        "stage",
        "parameter_bytes",
        "gradient_bytes",
        "optimizer_bytes",
        "activation_bytes",
        "peak_bytes",
    }
    # Two data ranks share each stage in float32, and every parameter is in one stage.
    assert sum(stage["parameter_bytes"] for stage in stages) == plan["parameters"] * 4 // 2
    assert plan["fits"] is True
    assert 0 < plan["bubble_fraction"] < 0.5
    assert "stage 1" in printed
    assert "fits: the peak of" in printed


def test_a_gpu_without_room_does_not_fit():
    config = load_config(SMALL)
    tiny = GPUS["h100"].__class__(**{**vars(GPUS["h100"]), "memory_bytes": 2**16})
    plan = make_plan(config, 64, 1, tiny, "tiny", 8)
    assert not plan.fits
    assert "is more than" in plan.reason


def test_flops_are_those_that_the_model_counts():
    """Without recompute, on one rank: of the products, three times the forward's."""
    config = load_config(SMALL)
    plan = make_plan(config, 64, 1, GPUS["h100"], "h100", 8)
    peak = GPUS["h100"].float32
    counted = plan.mfu * plan.seconds_per_step * peak
    assert plan.flops_per_rank == pytest.approx(counted, rel=0.1)


def test_the_layouts_of_four_ranks():
    layouts = {
        tuple(
            getattr(layout.parallelism, f"{name}_degree")
            for name in (
                "pipeline_parallel",
                "data_parallel_replicate",
                "context_parallel",
                "tensor_parallel",
                "expert_parallel",
            )
        )
        for layout in legal_layouts(load_config(SMALL), 64, 4)
    }
    assert (1, 1, 1, 1, 1) in layouts
    assert (2, 1, 1, 2, 2) in layouts
    assert all(pipeline <= 2 and tensor <= 2 for pipeline, _, _, tensor, _ in layouts)  # blocks, heads
    assert all(4 // (pipeline * replicas) % expert == 0 for pipeline, replicas, _, _, expert in layouts)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--gpu", "abacus"], "--gpu abacus is not known; choose from a100, h100, h200, b200, mi300x, cpu."),
        (["--world-size", "0"], "--world-size 0 must be at least 1."),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1 must be at least 1."),
        (["--parallelism.tensor_parallel_degree", "3"], "does not divide the 4 ranks; choose a divisor."),
        (["--model.nonsense", "1"], "model.nonsense"),
        (["--nonsense", "1"], "is not a setting"),
    ],
)
def test_refuses_in_one_sentence(flags, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        main([*SMALL, "--world-size", "4", *flags])


def test_ends_as_a_program_with_one_sentence(tmp_path):
    def ends(number: int, flags: list[str], sentence: str) -> None:
        result = run_program(main, [*SMALL, "--world-size", "4", *flags], tmp_path / str(number))
        assert result.returncode == 2
        assert result.stdout == ""
        assert sentence in result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr

    ends(0, ["--parallelism.tensor_parallel_degree", "3"], "tensor_parallel_degree = 3 does not divide the 4 ranks")
    ends(1, ["--model.num_heads", "1", "--parallelism.tensor_parallel_degree", "2"], "tensor_parallel_degree = 2")
    ends(2, ["--gpu", "abacus"], "--gpu abacus is not known; choose from")
    ends(3, ["--job.config_file", "train_configs/none.toml"], "train_configs/none.toml")


def test_says_why_a_run_does_not_fit(capsys, tmp_path):
    """The embedding and the head alone are 76 GiB of float32."""
    file = tmp_path / "plan.json"
    large = ["--model.vocab_size", "10000000", "--model.dim", "1024", "--training.global_batch_size", "2"]
    main([*SMALL, *large, "--world-size", "1", "--json", str(file)])
    assert "does not fit: the peak of " in (printed := capsys.readouterr().out)
    assert " GiB is more than 72.00 GiB, 90% of the memory of h100" in printed
    assert json.loads(file.read_text())["fits"] is False


def test_experts_cut_by_their_width_are_gathered_without_padding(monkeypatch):
    """Two experts on eight ranks: FSDP pads them to eight, unless their matrices are cut."""
    config = load_config([*SMALL, "--parallelism.expert_parallel_degree", "2", "--training.global_batch_size", "32"])

    def gathered() -> int:
        plan = make_plan(config, 64, 16, GPUS["h100"], "h100", 8)
        return next(
            num_bytes for axis, kind, _, num_bytes in plan.communication() if (axis, kind) == ("efsdp", "all_gather")
        )

    cut = gathered()
    monkeypatch.setattr(data, "_dim_of_experts", lambda parameter, degree: 0)
    assert gathered() == 4 * cut


RECIPES = Path(__file__).parents[2] / "train_configs"


@pytest.mark.parametrize(
    ("recipe", "world_size"),
    [
        pytest.param("linear_moe_a0.3b_2b", 1, marks=pytest.mark.long),
        ("linear_moe_a0.3b_2b", 8),
        pytest.param("linear_moe_a1b_7b", 8, marks=pytest.mark.long),
        pytest.param("linear_moe_a1b_7b_64", 64, marks=pytest.mark.long),
        pytest.param("linear_moe_a1b_7b_1024", 1024, marks=pytest.mark.long),
    ],
)
def test_recipes_fit_gpus_of_80_gb(recipe, world_size):
    """With a margin, and as the first lines of the recipe say."""
    file = RECIPES / f"{recipe}.toml"
    config = load_config(["--job.config_file", os.fspath(file)])
    plan = make_plan(config, config.model.vocab_size, world_size, GPUS["h100"], "h100", 8)
    assert plan.fits, plan.reason
    said = file.read_text().partition("[job]")[0]
    assert f" {plan.peak_bytes / 2**30:.1f} GiB" in said
    assert f" {plan.mfu:.0%}" in said
