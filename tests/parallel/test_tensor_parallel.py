"""Heads split over 2 and 4 gloo processes: every mixer trains as on one process; what cannot be split is refused."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from tests.conftest import run_on_ranks
from tests.mixers.test_every_mixer import CASES
from tests.parallel.parity import SETTINGS, assert_layouts_equal_one_process
from tests.parallel.test_context_parallel import EVERY_HYBRID, ONE_BLOCK, ROWS, compile_by_aot_eager
from torchlmoe.config.batch import check_degrees
from torchlmoe.config.load import ConfigError, load_config
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.parallel.islands import sum_island_gradients
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.parallel.parallelize import build_model
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.parallel.tensor import apply_tensor_parallel, tensor_parallel_plan
from torchlmoe.styles.heads import read_local_parts

ROOT = Path(__file__).parent.parent.parent
HEADS, SPANS = "--parallelism.tensor_parallel_degree", "--parallelism.context_parallel_degree"
REPLICAS = "--parallelism.data_parallel_replicate_degree"
EVERY_MIXER = {f"pure_{mixer}": f"{ONE_BLOCK} --model.mixer {mixer}" for mixer in MIXERS}
# One of each kind of sum, state and constant; test_roles.py has all mixers, in one process.
KINDS = ("gated_deltanet", "lightning", "s4", "rwkv6", "mom")
ROPE = "rope_scaling={type='yarn',factor=4,original_max_position_embeddings=16,mscale_all_dim=2}"
BIASES = " ".join(
    f"--model.layers.%s.{option}"
    for option in ("qkv_bias=true", "output_bias=true", "output_gate=per_head", "softmax_scale=0.4", ROPE)
)
ATTENTION_OPTIONS = f"--model.layers.L.qk_norm=all_heads --model.zero_centered_norm=true {BIASES.replace('%s', 'L')}"
# KDA and latent attention.
OPTIONS = (
    f"{ROWS} --model.layer_pattern LN --model.num_layers 2 --model.mixer kda --model.layers.L.full_rank_decay true "
    "--model.layers.L.decay_lower_bound=-5 --model.layers.L.head_dim 6 --model.layers.N.kv_rank 12 "
    f"--model.layers.N.q_rank 10 --model.layers.N.rotary_fraction 0.5 {BIASES.replace('%s', 'N')}"
)
ON_TWO = {**{name: EVERY_MIXER[name] for name in map("pure_{}".format, KINDS)}, "options": OPTIONS}
# Keys that ranks share, groups of which each has some; sums over heads; memories that are counted once.
ON_FOUR = {
    "shared_keys": f"{ONE_BLOCK} --model.layers.L.num_key_heads 2",
    "grouped_queries": f"{ONE_BLOCK} --model.mixer attention --model.layers.L.num_kv_heads 2",
    "groups": f"{ONE_BLOCK} --model.mixer mamba2 --model.layers.L.num_groups 2 --model.layers.L.proj_bias true",
    "attention_options": f"{ONE_BLOCK} --model.mixer attention --model.layers.L.num_kv_heads 2 {ATTENTION_OPTIONS}",
    "latent": f"{ONE_BLOCK} --model.mixer attention --model.layers.L.kv_rank 12 --model.layers.L.rotary_fraction 0.5",
    **{name: EVERY_MIXER[f"pure_{name}"] for name in ("ttt", "mamba")},
}
TWO_BLOCKS = f"{ROWS} --model.layer_pattern LN --model.num_layers 2"
SIX_ROWS = f"{TWO_BLOCKS} --training.global_batch_size 6"
WHOLE_MODELS = {
    "rwkv7_tied_muon": f"{SIX_ROWS} --model.mixer rwkv7 --model.tie_embeddings true --optimizer.name muon",
    "mom_recomputed": f"{SIX_ROWS} --model.mixer mom --activation_checkpoint.mode full --training.local_batch_size 1 "
    "--model.layers.L.mlp_token_shift true --model.layers.N.mlp_token_shift true --model.layers.N.mlp dense",
    "hgrn2_dense": f"{SIX_ROWS} --model.mixer hgrn2 --model.layers.N.mlp dense --moe.num_shared_experts 1 "
    "--model.norm layer --model.embedding_norm true",
    "selective": f"{SIX_ROWS} --model.mixer kda --moe.aux_loss_scope global_batch "
    "--activation_checkpoint.mode selective",
}
# Blocks of one part, every placement of norms and every multiplier, token shifts, and layers without a gate.
OTHER_BLOCKS = {
    "other_blocks": f"""{ROWS} --model.layer_pattern MFNP --model.layers.M.mixer mamba2 --model.layers.M.mlp none
    --model.layers.M.mixer_branch_weight 0.22 --model.layers.F.mixer none --model.layers.F.norm_placement post
    --model.layers.N.norm_placement stream --model.layers.N.mixer_stream_weight 1.5
    --model.layers.N.mlp_branch_weight 0.75 --model.layers.N.qk_norm true --model.layers.N.mlp dense
    --model.layers.N.mlp_options.activation relu2 --model.layers.P.mixer attention --model.layers.P.norm_placement post
    --moe.activation relu2 --moe.latent_dim 12 --moe.num_shared_experts 1 --model.zero_centered_norm true
    --model.embedding_multiplier 12.0 --model.embedding_norm true --model.logit_divisor 6.0 --optimizer.name muon
    --model.tie_embeddings true --model.layers.F.mlp_token_shift true --model.layers.N.mlp_token_shift true
    --activation_checkpoint.mode selective"""
}
COMPILED = {"compiled": f"{TWO_BLOCKS} --compile.enable true"}


def test_equals_one_process(corpus, tmp_path):
    layouts = {
        2: {
            "heads": (ON_TWO, f"{HEADS} 2"),
            "other_heads": (OTHER_BLOCKS, f"{HEADS} 2 --parallelism.expert_parallel_degree 2"),
            "other_spans": (OTHER_BLOCKS, f"{SPANS} 2"),
            "other_stages": (OTHER_BLOCKS, "--parallelism.pipeline_parallel_degree 2 --training.local_batch_size 1"),
        },
        4: {
            "more_heads": (ON_FOUR, f"{HEADS} 4"),
            "heads_and_rows": (WHOLE_MODELS, f"{HEADS} 2"),
            "heads_and_spans": ({"mom_recomputed": WHOLE_MODELS["mom_recomputed"]}, f"{HEADS} 2 {SPANS} 2"),
            "heads_and_replicas": ({"selective": WHOLE_MODELS["selective"]}, f"{HEADS} 2 {REPLICAS} 2"),
        },
    }
    float32 = ["pure_gated_deltanet", "shared_keys"]
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=2, float32=float32)


@pytest.mark.long
def test_hybrids_equal_one_process(corpus, tmp_path):
    """Twenty steps of every mixer with softmax blocks and experts, on packed documents."""
    two = EVERY_HYBRID | EVERY_MIXER | COMPILED
    layouts = {2: {"two": (two, f"{HEADS} 2")}, 4: {"four": (EVERY_HYBRID, f"{HEADS} 4")}}
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=20, float32=None, setup=compile_by_aot_eager)


def collectives_in(recording) -> Counter:
    prefix = "_c10d_functional::"
    names = (event.name.removeprefix(prefix) for event in recording.events() if event.name.startswith(prefix))
    return Counter(name for name in names if name not in ("wait_tensor", "_wrap_tensor_autograd"))


def count_collectives() -> None:
    """Of one mixer each way, against the table of docs/parallelism.md."""
    start_process_group(torch.device("cpu"))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    page = (ROOT / "docs" / "parallelism.md").read_text()
    sums = {
        name: int(number)
        for names, number in re.findall(r"^\| ((?:`\w+` ?)+) \| (\d) \|", page, re.MULTILINE)
        for name in re.findall(r"\w+", names)
    }
    model_flags = "--model.layer_pattern L --model.num_layers 1 --model.dim 32 --model.num_heads 4".split()
    for name in MIXERS:
        options = [f"--model.layers.L.{key}={value}" for key, value in CASES[name][1].items()]
        config = load_config([*model_flags, "--model.mixer", name, *options])
        model = build_on_meta(config, 50).to_empty(device="cpu")
        model.init_weights(0)
        apply_tensor_parallel(model, tensor_parallel_plan(model, 2), mesh)
        read_local_parts(model)
        mixer = model.blocks["0"].mixer
        sequence = SequenceLayout.of_packed_rows(torch.tensor([[0, 7, 32]], dtype=torch.int32), 32)
        x = torch.randn(1, 16, 32, requires_grad=True)
        shared = {"shared": torch.zeros(1, 32, 16)} if mixer.shared_width else {}
        for part in ("forward", "backward"):
            with profile(activities=[ProfilerActivity.CPU]) as recording:
                if part == "forward":
                    y = mixer(x, sequence=sequence, **shared)
                    y = y[0] if isinstance(y, tuple) else y
                else:
                    y.square().sum().backward()
            expected = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": sums.get(name, 0)}
            assert collectives_in(recording) == Counter(expected), (name, part, collectives_in(recording))


def test_collectives_are_those_of_the_table():
    run_on_ranks(2, count_collectives)


def check_uneven_vocabularies() -> None:
    """Logits, and gradients of logits and of losses."""
    device = torch.device("cpu")
    start_process_group(device)
    for vocab_size, degree in ((50, 4), (5, 2)):
        for tied in ("true", "false"):
            flags = f"{TWO_BLOCKS} --model.tie_embeddings {tied} --training.dtype float64 --moe.balance none"
            config = load_config([*SETTINGS, *flags.split(), *f"{HEADS} {degree} --model.num_heads 4".split()])
            ranks = Ranks(config.parallelism, "cpu")
            model = build_model(config, vocab_size, ranks, device)
            whole = build_on_meta(config, vocab_size).double().to_empty(device="cpu")
            whole.init_weights(config.training.seed)
            tokens = torch.arange(48).view(1, 48) % vocab_size
            logits, expected = model(tokens), whole(tokens)
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)
            weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
            for found, right in (
                ((logits * weight).sum(), (expected * weight).sum()),
                (model(tokens, None, tokens), whole(tokens, None, tokens)),
            ):
                found.backward()
                (right * ranks.num_row_places).backward()  # the sum over ranks with other rows, which are equal here
                sum_island_gradients(model)
                for name, parameter in whole.named_parameters():
                    gradient = model.get_parameter(name).grad.full_tensor()
                    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)
                model.zero_grad()
                whole.zero_grad()


def test_vocabularies_that_ranks_cannot_divide():
    run_on_ranks(4, check_uneven_vocabularies)


REFUSED = {
    "--model.num_heads 6": "cannot split the 6 heads or channels of q_proj (GatedDeltaNet) of model.layers.L; "
    "degrees that fit this model: 1, 2, 3, 6.",
    "--model.num_heads 4 --model.layers.L.mlp dense --model.mlp_dim 30": "cannot split the 30 heads or channels of "
    "gate_proj (Dense) of model.layers.L",
    "--model.num_heads 12 --model.layers.N.num_kv_heads 3": "cannot split the 3 heads or channels of k_proj "
    "(Attention) of model.layers.N; degrees that fit this model: 1, 3, 6, 12.",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items())
def test_heads_that_do_not_fit_are_refused(arguments, message):
    model = build_on_meta(load_config([*"--model.dim 96 --model.layer_pattern LN".split(), *arguments.split()]), 50)
    with pytest.raises(ValueError, match=re.escape(message)):
        tensor_parallel_plan(model, 4)


def test_modules_without_a_role_are_refused():
    model = build_on_meta(load_config([]), 50)
    model.blocks["0"].mixer.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"cannot split blocks.0.mixer.extra \(Linear\), which does not name in"):
        tensor_parallel_plan(model, 3)


def test_a_vocabulary_that_leaves_a_rank_without_rows_is_refused():
    flags = "--model.layer_pattern L --model.num_layers 1 --model.num_heads 4".split()
    with pytest.raises(ValueError, match=r"leaves a rank without any of the 5 rows of the vocabulary; choose a lower"):
        tensor_parallel_plan(build_on_meta(load_config(flags), 5), 4)
    assert tensor_parallel_plan(build_on_meta(load_config(flags), 7), 4)


def test_a_loss_without_a_split_vocabulary_is_refused():
    model = build_on_meta(load_config([]), 50)
    model.spec = replace(model.spec, loss=lambda hidden, weight, labels, chunk_size: hidden.sum())
    with pytest.raises(ValueError, match=r"but the loss of training.loss does not take"):
        tensor_parallel_plan(model, 3)


DEGREES = {
    f"{HEADS} 3": "parallelism.tensor_parallel_degree = 3 does not divide the 8 ranks; choose a divisor.",
    f"{HEADS} 2 {SPANS} 2 --parallelism.data_parallel_shard_degree 3": "data_parallel_shard_degree = 3 times "
    "context_parallel_degree = 2 times tensor_parallel_degree = 2 is 12, but there are 8 ranks",
    f"{HEADS} 4 {SPANS} 2 --training.seq_len 6 --training.local_batch_size 2": "tensor_parallel_degree = 4 times "
    "context_parallel_degree = 2 does not divide the 2 x 6 tokens",
    "--parallelism.expert_parallel_degree 3": "expert_parallel_degree = 3 does not divide the 8 ranks of",
}


@pytest.mark.parametrize(("arguments", "message"), DEGREES.items())
def test_degrees_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_degrees(load_config(arguments.split()), 8)
