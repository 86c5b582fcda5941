"""Experts spread over 2, 3 and 4 gloo processes, which have other rows, spans or pieces: as on one process."""

from tests.parallel.parity import assert_layouts_equal_one_process

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
FEW = {name: ROUTINGS[name] for name in ("global_batch", "capacity", "shared")}


def test_equals_one_process(corpus, tmp_path):
    layouts = {
        2: {"ep_over_rows": (ROUTINGS, f"{EXPERTS} 2")},
        3: {"ep_over_spans": (ROUTINGS, f"{SPANS} 3 {EXPERTS} 3")},
        4: {
            "ep_over_rows_and_pieces": (ROUTINGS, f"{HEADS} 2 {EXPERTS} 4"),
            "ep_over_spans_of_replicas": (
                FEW,
                f"{SPANS} 2 {EXPERTS} 2 --parallelism.data_parallel_replicate_degree 2",
            ),
            "ep_within_spans_and_pieces": (FEW, f"{SPANS} 2 {HEADS} 2 {EXPERTS} 2"),
        },
    }
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=4, float32=["shared"])
