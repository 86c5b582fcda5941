"""Experts spread over 2, 3 and 4 gloo processes, which have other rows, spans or pieces: as on one process."""

import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _get_work_registry_size

from tests.conftest import run_on_ranks
from tests.parallel.parity import SETTINGS, assert_layouts_equal_one_process
from torchlmoe.checkpoint import open_model
from torchlmoe.config.load import load_config
from torchlmoe.feed_forwards.experts import Experts
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.parallel.expert import check_experts
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.parallel.parallelize import build_model
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.training.trainer import Trainer

EXPERTS, HEADS = "--parallelism.expert_parallel_degree", "--parallelism.tensor_parallel_degree"
SPANS = "--parallelism.context_parallel_degree"
# Six rows of 48 tokens a step; twelve experts, of which 2, 3 and 4 ranks have equal parts.
ROWS = "--training.global_batch_size 6 --model.num_heads 4 --moe.num_experts 12 --model.num_layers 2"
BLOCKS = f"{ROWS} --model.layer_pattern LN --model.mixer gla"
# Every balance and scope, kinds of routing and of experts; a short last row; each in one run or another.
ROUTINGS = {
    "sequence": f"{BLOCKS} --data.max_tokens 1000 --moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.1",
    "global_batch": f"{BLOCKS} --moe.aux_loss_scope global_batch --moe.aux_loss_weight 0.1 --model.tie_embeddings true",
    "loss_free": f"{BLOCKS} --moe.balance loss_free --moe.bias_update_rate 0.1 --optimizer.name muon "
    "--moe.score_function sigmoid --moe.num_expert_groups 4 --moe.num_limited_groups 2 --moe.group_score top2_sum",
    "shared": f"{BLOCKS} --moe.balance none --moe.num_shared_experts 2 --moe.shared_expert_gate true "
    "--activation_checkpoint.mode full --moe.normalize_top_k false",
    "capacity": f"{BLOCKS} --data.max_tokens 1000 --moe.capacity_factor 0.7 --activation_checkpoint.mode selective",
    # 60 experts for 48 tokens, so that some have none.
    "many_experts": f"{BLOCKS} --moe.num_experts 60 --moe.top_k 1 --training.global_batch_size 6",
}


def some(*names: str) -> dict[str, str]:
    return {name: ROUTINGS[name] for name in names}


REPLICAS = "--parallelism.data_parallel_replicate_degree 2"
ROWS_AND_PIECES = f"{HEADS} 2 {EXPERTS} 4"
SPANS_OF_REPLICAS = f"{SPANS} 2 {EXPERTS} 2 {REPLICAS}"
SPANS_AND_PIECES = f"{SPANS} 2 {HEADS} 2 {EXPERTS} 2"


def test_equals_one_process(corpus, tmp_path):
    layouts = {
        2: {"rows": (ROUTINGS, f"{EXPERTS} 2")},
        3: {"spans": (some("global_batch", "capacity"), f"{SPANS} 3 {EXPERTS} 3")},
        4: {
            "rows_and_pieces": (some("loss_free", "capacity"), ROWS_AND_PIECES),
            "spans_of_replicas": (some("shared"), SPANS_OF_REPLICAS),
            "spans_and_pieces": (some("sequence"), SPANS_AND_PIECES),
        },
    }
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=2, float32=())


def test_fewer_experts_than_ranks_that_share_them(corpus, tmp_path):
    """FSDP cuts their matrices, which Muon moves as a whole, and checkpoints are those of one process."""
    few = f"{BLOCKS} --moe.num_experts 2 --training.global_batch_size 4 --checkpoint.enable true"
    muon = {"muon": f"{few} --optimizer.name muon"}
    layouts = {4: {"rows": (muon | {"adamw": few}, ""), "rows_and_pieces": (muon, f"{HEADS} 2 {EXPERTS} 2")}}
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=2, float32=(), setup=assert_matrices_are_cut)
    for layout in layouts[4]:
        (found, *_), (expected, *_) = open_model(tmp_path / layout / "muon"), open_model(tmp_path / "whole" / "muon")
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-6, atol=1e-9)


def assert_matrices_are_cut() -> None:
    """On every process: models that are trained afterwards have a part of every expert on each rank."""
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    build = build_model

    def checked(*args):
        model = build(*args)
        for module in model.modules():
            if isinstance(module, Experts):
                assert {place.dim for place in module._parameters["down_proj"].placements if place.is_shard()} >= {1}
        return model

    patch("torchlmoe.training.trainer.build_model", checked).start()


def count_unfinished_messages() -> None:
    """Messages that nobody waits for stay in torch's registry, and hold the graph of their block."""
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    for mode in ("none", "selective", "full"):
        flags = f"{BLOCKS} {EXPERTS} 2 --training.global_batch_size 2 --activation_checkpoint.mode {mode}".split()
        config = load_config([*SETTINGS, *flags])
        start_process_group(torch.device("cpu"))
        ranks = Ranks(config.parallelism, "cpu")
        model = build_model(config, 64, ranks, torch.device("cpu"))
        before = _get_work_registry_size()
        model(tokens, None, tokens).sum().backward()
        assert _get_work_registry_size() == before, mode


def test_every_message_is_waited_for():
    run_on_ranks(2, count_unfinished_messages)


@pytest.mark.long
def test_every_routing_and_more_steps(corpus, tmp_path):
    layouts = {
        2: {"rows": (ROUTINGS, f"{EXPERTS} 2"), "spans": (ROUTINGS, f"{SPANS} 2 {EXPERTS} 2")},
        3: {"spans_of_three": (ROUTINGS, f"{SPANS} 3 {EXPERTS} 3")},
        4: {
            "pieces": (ROUTINGS, f"{HEADS} 4 {EXPERTS} 4"),
            "rows_and_pieces": (ROUTINGS, ROWS_AND_PIECES),
            "spans_of_replicas": (ROUTINGS, SPANS_OF_REPLICAS),
            "spans_and_pieces": (ROUTINGS, SPANS_AND_PIECES),
        },
    }
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=20, float32=None)


def count_exchanged_numbers(corpus: str, folder: str) -> None:
    """The one time that a GPU would be waited for: per layer and microbatch, and not again in recompute."""
    data = ["--data.dataset", corpus, "--data.cache_dir", f"{corpus}/cache", "--validation.enable", "false"]
    for mode in ("none", "selective", "full"):
        flags = f"{BLOCKS} {EXPERTS} 2 --training.steps 1 --activation_checkpoint.mode {mode}".split()
        trainer = Trainer(load_config([*SETTINGS, *data, *flags, "--job.dump_folder", f"{folder}/{mode}"]))
        # Of functions of torch.distributed, the exchange of numbers alone calls this one.
        with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
            trainer.train_step(0)
        trainer.close()
        assert exchange.call_count == 2 * 3, mode  # blocks, microbatches of this rank


def test_numbers_of_rows_are_exchanged_once(corpus, tmp_path):
    run_on_ranks(2, count_exchanged_numbers, str(corpus), str(tmp_path))


def test_experts_that_do_not_divide_are_refused():
    run_on_ranks(2, refuse)


def test_experts_outside_of_moe_layers_are_refused():
    model = build_on_meta(load_config([]), 50)
    check_experts(model, 2)
    model.blocks["1"].feed_forward.others = Experts(8, 8, 2)
    check_experts(model, 1)
    with pytest.raises(ValueError, match=r"MoE layers only, not feed_forward.others of model\.layers\.\w; make its"):
        check_experts(model, 2)


def refuse() -> None:
    config = load_config([*SETTINGS, *f"{EXPERTS} 2 --moe.num_experts 9".split()])
    device = torch.device("cpu")
    start_process_group(device)
    with pytest.raises(ValueError, match=r"degree = 2 does not divide the 9 experts of model\.layers\.L"):
        build_model(config, 50, Ranks(config.parallelism, "cpu"), device)
