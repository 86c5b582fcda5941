"""python -m torchlmoe.plan: what it prints and writes, which layouts it finds, and what it refuses."""

import json
import os
import re
from pathlib import Path

import pytest

from torchlmoe.config.load import load_config
from torchlmoe.plan import main
from torchlmoe.planning.gpus import GPUS
from torchlmoe.planning.layout import make_plan
from torchlmoe.planning.schedule import makespan
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


def test_the_bubble_of_1f1b():
    """With equal stages it is (P - 1) / (P - 1 + M), whatever a backward takes (arXiv 2104.04473)."""
    from types import SimpleNamespace

    from torch.distributed.pipelining.schedules import Schedule1F1B

    ranks, microbatches = 4, 8
    order = Schedule1F1B._get_pipeline_order(SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches))  # type: ignore[arg-type]
    seconds, bubble = makespan(order, lambda kind, stage: 1.0 if kind == "forward" else 2.0, transfer=0.0)
    assert seconds == pytest.approx(3.0 * (microbatches + ranks - 1))
    assert bubble == pytest.approx((ranks - 1) / (ranks - 1 + microbatches))


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
    config = load_config(["--job.config_file", os.fspath(RECIPES / f"{recipe}.toml")])
    plan = make_plan(config, config.model.vocab_size, world_size, GPUS["h100"], "h100", 8)
    assert plan.fits, plan.reason
