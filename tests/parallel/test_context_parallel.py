"""A sequence split over 2, 3 and 4 gloo processes trains as one process does; what cannot be split is refused."""

import re
from functools import partial

import pytest

import torchlmoe.parallel.compile as compile_module
from tests.conftest import run_on_ranks
from tests.parallel.test_data_parallel import SETTINGS, assert_same_runs, train_all
from torchlmoe.config_loader import load_config
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.base import Mixer
from torchlmoe.training.trainer import Trainer

# Three rows of 48 tokens at once: borders of 2 and 4 spans lie within rows, and most of them within documents.
ROWS = "--training.global_batch_size 3 --training.local_batch_size 3 --validation.interval 20 --model.num_heads 4"
RING = "--parallelism.lsm_context_parallel ring"
ULYSSES = "--parallelism.attention_context_parallel ulysses"
HYBRIDS = {mixer: f"{ROWS} --model.mixer {mixer} --model.layer_pattern LLLN" for mixer in MIXERS}
PURE = {
    f"pure_{mixer}": f"{ROWS} --model.mixer {mixer} --model.layer_pattern L --model.num_layers 1" for mixer in MIXERS
}
# What sums over a row, a microbatch or a step.
SUMS = {
    "global_batch": f"{ROWS} --moe.aux_loss_scope global_batch --moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.01",
    "rows": f"{ROWS} --moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.01 --model.tie_embeddings true",
    "loss_free": f"{ROWS} --moe.balance loss_free --moe.bias_update_rate 0.1 --optimizer.name muon",
}
MORE_ROWS = f"{ROWS} --training.global_batch_size 6 --activation_checkpoint.mode"
RECOMPUTED = {
    "full": f"{MORE_ROWS} full --model.mixer rwkv7",
    "compiled": f"{MORE_ROWS} selective --compile.enable true --model.num_layers 2 --model.layer_pattern LN",
}
SPANS = "--parallelism.context_parallel_degree"


def train(*arguments) -> None:
    compile_module.compile_block = partial(compile_module.compile_block, backend="aot_eager")
    train_all(*arguments)


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    run_on_ranks(1, train, str(corpus), str(folder), {**HYBRIDS, **PURE, **SUMS, **RECOMPUTED}, "")
    return folder


@pytest.mark.parametrize(
    ("world_size", "variants", "extra"),
    [
        (2, HYBRIDS, f"{SPANS} 2"),
        (4, PURE, f"{SPANS} 4 {RING} {ULYSSES}"),
        (3, SUMS, f"{SPANS} 3"),
        (4, RECOMPUTED, f"{SPANS} 2"),
        (4, RECOMPUTED, f"{SPANS} 2 {RING} {ULYSSES} --parallelism.data_parallel_replicate_degree 2"),
    ],
)
def test_equals_one_process(world_size, variants, extra, one_process, corpus, tmp_path):
    run_on_ranks(world_size, train, str(corpus), str(tmp_path), variants, extra)
    assert_same_runs(tmp_path, one_process, variants)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    {
        "--training.seq_len 2 --training.global_batch_size 4": (
            "parallelism.context_parallel_degree = 2 leaves spans of 2 tokens, and q_conv of model.layers.L looks back "
            "3; choose a lower degree or longer rows."
        ),
        "--training.seq_len 4 --validation.local_batch_size 1 --model.mixer mom": (
            "spans of 2 tokens, and inner.q_conv of model.layers.L looks back 3"
        ),
        "--model.mixer gla": (
            "parallelism.context_parallel_degree = 2 cannot split the GatedLinearAttention of model.layers.L with "
            "lsm_context_parallel = 'all_gather' and attention_context_parallel = 'all_gather'; choose another"
        ),
    }.items(),
)
def test_refused_before_data_is_looked_for(settings, sentence, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    if "gla" in settings:  # as a mixer that has no style
        monkeypatch.setattr(Mixer, "sequence_parallel_plan", lambda *_, **__: {})
    arguments = [*SETTINGS, *f"{SPANS} 2 --training.local_batch_size 2 --data.dataset nowhere {settings}".split()]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Trainer(load_config(arguments))
