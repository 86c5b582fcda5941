"""Pipelines of gloo processes train as one process does; the cut, its costs and what cannot be cut."""

from itertools import combinations, pairwise

import pytest
import torch

from tests.parallel.parity import assert_layouts_equal_one_process, differences
from tests.parallel.test_context_parallel import compile_by_aot_eager
from tests.parity_matrix import LAYOUTS, MODELS, REFUSED, is_equal, refusal, train
from torchlmoe.config.load import load_config
from torchlmoe.model.decoder import build_on_meta, count_parameters
from torchlmoe.parallel.stages import balanced, cut, elsewhere, stage_bounds, stage_costs

# Of the matrix, in few processes: every schedule, what stages share, and a pipeline beside each other axis.
QUICK = {
    "pp=2 interleaved": ("rwkv7, tied", "hgrn2, Muon, tied"),
    "pp=2 split=1": ("mom",),
    "pp=2 tp=2": ("mamba2, tied",),
    "pp=2 cp=2": ("mom",),
    "pp=2 dp=2 ep=2": ("gla, Muon",),
    "pp=4": ("gated_deltanet",),
}
COMPILED = {"compiled": f"{MODELS['mom']} --compile.enable true --model.num_layers 2 --model.layer_pattern LN"}


def test_layouts_equal_one_process(corpus, tmp_path):
    by_size: dict = {}
    for layout in LAYOUTS:
        if layout.name in QUICK:
            models = {model: MODELS[model] for model in QUICK[layout.name]}
            by_size.setdefault(layout.world_size, {})[layout.name] = (models, layout.flags)
    by_size[2]["compiled"] = (COMPILED, "--parallelism.pipeline_parallel_degree 2")
    assert_layouts_equal_one_process(
        by_size, corpus, tmp_path, steps=2, float32=("rwkv7, tied",), setup=compile_by_aot_eager
    )


@pytest.mark.long
def test_every_layout_equals_one_process(corpus, tmp_path):
    train(LAYOUTS, corpus, tmp_path, steps=20)
    for layout in LAYOUTS:
        for model in layout.models:
            difference = differences(tmp_path / layout.name, tmp_path / "whole", model, 20)
            assert is_equal(difference), (layout.name, model, difference)


def test_what_is_refused():
    for ranks, flags in REFUSED:
        sentence = refusal(flags, ranks)
        assert "parallelism." in sentence or "float8." in sentence or "global_batch_size" in sentence
        assert "\n" not in sentence


def config_of(*flags):
    return load_config(["--model.num_layers", "6", "--parallelism.pipeline_parallel_degree", "3", *flags])


def test_cuts_are_as_even_as_can_be():
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 3, 4):
        for _ in range(20):
            costs = torch.randint(1, 9, (7,), generator=generator).tolist()
            bounds = balanced(costs, number)
            assert bounds[0] == 0
            assert bounds[-1] == len(costs)
            assert len(bounds) == number + 1

            def dearest(bounds, costs=costs):
                return max(sum(costs[first:end]) for first, end in pairwise(bounds))

            cuts = combinations(range(1, len(costs)), number - 1)
            assert dearest(bounds) == min(dearest([0, *places, len(costs)]) for places in cuts)


def test_costs_and_splits():
    config = config_of("--model.layers.N.mlp", "dense", "--model.layer_pattern", "LN")
    model = build_on_meta(config, 300)
    costs = stage_costs(model, config.training.seq_len)
    assert sum(costs) == model.flops_per_token(config.training.seq_len)
    assert costs[0] == costs[2] != costs[1] == costs[3] < costs[5]
    assert stage_bounds(model, config_of("--parallelism.pipeline_parallel_split", "1,5")) == [0, 1, 5, 6]
    assert stage_bounds(model, config_of("--parallelism.pipeline_parallel_split", "[0, 2, 3]")) == [0, 2, 3, 6]
    for split in ("3,2", "2,2", "1,6", "-1,2"):
        with pytest.raises(ValueError, match=r"pipeline_parallel_split = .* must rise and name blocks from 1 to 5"):
            stage_bounds(model, config_of("--parallelism.pipeline_parallel_split", split))


@pytest.mark.parametrize("tied", ["false", "true"])
def test_parts_are_the_whole(tied):
    """Interleaved stages: each parameter is somewhere, shared ones where they are used, under the whole's names."""
    config = config_of("--model.mixer", "hgrn2", "--model.tie_embeddings", tied)
    model = build_on_meta(config, 300)
    parts = [cut(model, [0, 1, 2, 3, 4, 5, 6], rank, 3) for rank in range(3)]
    names = [set(part.state_dict()) for part in parts]
    assert set().union(*names) == set(model.state_dict())
    assert [list(part.blocks) for part in parts] == [["0", "3"], ["1", "4"], ["2", "5"]]
    assert [elsewhere(part) for part in parts] == [set(model.state_dict()) - of_part for of_part in names]
    twice = {name for first, second in combinations(names, 2) for name in first & second}
    common = {"common.L.weight"}
    assert twice == common | ({"embedding.weight"} if tied == "true" else set())
    assert parts[0].pipeline.names == [[name for name, _ in part.named_parameters()] for part in parts]
    held = sum(parameter.numel() for part in parts for parameter in part.parameters())
    again = sum(
        parameter.numel() * (sum(name in of_part for of_part in names) - 1)
        for name, parameter in model.named_parameters()
    )
    assert held == count_parameters(model) + again
