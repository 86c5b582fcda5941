"""A sequence split over 2, 3 and 4 gloo processes trains as one process does; what cannot be split is refused."""

import copy
import re
from functools import partial

import pytest
import torch

import torchlmoe.parallel.compile as compile_module
import torchlmoe.parallel.parallelize as parallelize
from tests.conftest import run_on_ranks
from tests.parallel.parity import SETTINGS, assert_layouts_equal_one_process
from torchlmoe.config.load import load_config
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.base import Mixer
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.parallel.parallelize import build_model
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.training.trainer import Trainer

# Three rows of 48 tokens at once: borders of 2 and 4 spans lie within rows, and most of them within documents.
ROWS = "--training.global_batch_size 3 --training.local_batch_size 3 --model.num_heads 4"
ONE_BLOCK = f"{ROWS} --model.layer_pattern L --model.num_layers 1"
EVERY_HYBRID = {mixer: f"{ROWS} --model.mixer {mixer} --model.layer_pattern LLLN" for mixer in MIXERS}
# One of each kind of state and of what looks across tokens; test_sequence_parallel.py has all mixers on 3 ranks.
KINDS = ("lightning", "kda", "rwkv6", "rwkv7", "gsa", "gateloop", "mom", "mamba", "ttt", "titans", "attention")
PURE = {f"pure_{mixer}": f"{ONE_BLOCK} --model.mixer {mixer}" for mixer in KINDS}
FEW = {f"pure_{mixer}": PURE[f"pure_{mixer}"] for mixer in ("kda", "rwkv7", "gsa", "mom", "titans", "attention")}
TWO_BLOCKS = f"{ROWS} --model.layer_pattern LN --model.num_layers 2"
PADDED = "--data.max_tokens 1000"  # 20 rows of 48 tokens and one of 40, which comes up every 21 rows
# What sums over a row, a microbatch or a step.
SUMS = {
    "global_batch": f"{TWO_BLOCKS} --moe.aux_loss_scope global_batch --moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.1",
    "rows": f"{TWO_BLOCKS} {PADDED} --moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.1 --model.tie_embeddings true",
    "loss_free": f"{TWO_BLOCKS} {PADDED} --moe.balance loss_free --moe.bias_update_rate 0.1 --optimizer.name muon",
}
COMPILED = {"compiled": f"{TWO_BLOCKS} --compile.enable true --model.layers.L.mlp_token_shift true"}
RECOMPUTED = {"full": f"{TWO_BLOCKS} --training.global_batch_size 6 --activation_checkpoint.mode full"}

SPANS = "--parallelism.context_parallel_degree"
RING = "--parallelism.lsm_context_parallel ring --parallelism.attention_context_parallel ulysses"
HSDP = f"{SPANS} 2 {RING} --parallelism.data_parallel_replicate_degree 2"


def compile_by_aot_eager() -> None:
    compile_module.compile_block = partial(compile_module.compile_block, backend="aot_eager")


def test_equals_one_process(corpus, tmp_path):
    layouts = {
        2: {"all_gather": (FEW | COMPILED, f"{SPANS} 2")},
        3: {"rows_across_spans": (SUMS, f"{SPANS} 3")},
        4: {
            "ring": ({name: PURE[name] for name in ("pure_kda", "pure_titans", "pure_attention")}, f"{SPANS} 4 {RING}"),
            "fsdp": (RECOMPUTED, f"{SPANS} 2"),
            "hsdp": (RECOMPUTED, HSDP),
        },
    }
    float32 = ["pure_kda", "rows"]
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=2, float32=float32, setup=compile_by_aot_eager)


@pytest.mark.long
def test_every_hybrid_and_more_steps(corpus, tmp_path):
    layouts = {
        2: {"all_gather": (EVERY_HYBRID, f"{SPANS} 2")},
        3: {"rows_across_spans": (SUMS, f"{SPANS} 3")},
        4: {"ring": (PURE, f"{SPANS} 4 {RING}"), "hsdp": (RECOMPUTED, HSDP)},
    }
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=20, float32=None)


def check_logits() -> None:
    """Of rows that are one document each, and without labels; of a copy too, which has separate weights."""
    config = load_config([*SETTINGS, *f"{SPANS} 2 --training.dtype float64".split()])
    device = torch.device("cpu")
    start_process_group(device)
    ranks = Ranks(config.parallelism, "cpu")
    apply_fsdp, parallelize.apply_fsdp = parallelize.apply_fsdp, lambda *_: None  # whose modules cannot be copied
    model = build_model(config, 50, ranks, device)
    parallelize.apply_fsdp = apply_fsdp
    whole = build_on_meta(config, 50).double().to_empty(device="cpu")
    whole.init_weights(config.training.seed)
    tokens = torch.arange(60).view(3, 20) % 50
    expected = whole(tokens).view(1, 60, 50).chunk(2, 1)[ranks["cp"].get_local_rank()]
    torch.testing.assert_close(model(tokens), expected, rtol=1e-9, atol=1e-12)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(copied(tokens), expected, rtol=1e-9, atol=1e-12)


def test_logits_of_a_span():
    run_on_ranks(2, check_logits)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    {
        "--training.seq_len 2 --training.global_batch_size 4": (
            "parallelism.context_parallel_degree = 2 leaves spans of 2 tokens, and q_conv of model.layers.L looks back "
            "3; choose a lower degree or longer rows."
        ),
        "--training.seq_len 4 --validation.local_batch_size 1 --model.mixer mom --model.layers.L.single_kv_proj true": (
            "spans of 2 tokens, and inner.q_conv of model.layers.L looks back 3"
        ),
        "--model.num_heads 3 --model.dim 48 --parallelism.attention_context_parallel ulysses": (
            "parallelism.context_parallel_degree = 2 does not divide the 3 heads of model.layers.N, which "
            "attention_context_parallel = 'ulysses' spreads; choose a divisor, or 'all_gather'."
        ),
        "--parallelism.tensor_parallel_degree 2 --parallelism.attention_context_parallel ulysses "
        "--model.num_heads 6 --model.dim 48": (
            "context_parallel_degree = 2 times tensor_parallel_degree = 2 does not divide the 6 heads of model.layers.N"
        ),
        "--model.mixer gla": (
            "parallelism.context_parallel_degree = 2 cannot split the GatedLinearAttention of model.layers.L with "
            "lsm_context_parallel = 'all_gather' and attention_context_parallel = 'all_gather'; choose another"
        ),
    }.items(),
)
def test_refused_before_data_is_looked_for(settings, sentence, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4" if "tensor" in settings else "2")
    if "gla" in settings:  # as a mixer that has no style
        monkeypatch.setattr(Mixer, "context_parallel_plan", lambda *_, **__: {})
    arguments = [*SETTINGS, *f"{SPANS} 2 --training.local_batch_size 2 --data.dataset nowhere.jsonl {settings}".split()]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Trainer(load_config(arguments))
