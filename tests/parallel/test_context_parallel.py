"""A sequence split over 2, 3 and 4 gloo processes trains as one process does; what cannot be split is refused."""

import pytest

from tests.conftest import run_on_ranks
from tests.parallel.test_data_parallel import assert_same_runs, train_all
from torchlmoe.mixers import MIXERS

# Three rows of 48 tokens at once: borders of 2 and 4 spans lie within rows, and most of them within documents.
ROWS = "--training.global_batch_size 3 --training.local_batch_size 3 --validation.interval 20 --model.num_heads 4"
RING = "--parallelism.lsm_context_parallel ring"
ULYSSES = "--parallelism.attention_context_parallel ulysses"
HYBRIDS = {mixer: f"--model.mixer {mixer} --model.layer_pattern LLLN" for mixer in MIXERS}
PURE = {f"pure_{mixer}": f"--model.mixer {mixer} --model.layer_pattern L --model.num_layers 1" for mixer in MIXERS}
# What sums over a row, a microbatch or a step.
SUMS = {
    "global_batch": "--moe.aux_loss_scope global_batch --moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.01",
    "rows": "--moe.aux_loss_weight 0.1 --moe.z_loss_weight 0.01 --optimizer.name muon --model.tie_embeddings true",
    "loss_free": "--moe.balance loss_free --moe.bias_update_rate 0.1 --moe.score_function sigmoid",
}


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    run_on_ranks(1, train_all, str(corpus), str(folder), {**HYBRIDS, **PURE, **SUMS}, ROWS)
    return folder


@pytest.mark.parametrize(
    ("degree", "variants", "extra"),
    [(2, HYBRIDS, ""), (4, PURE, f"{RING} {ULYSSES}"), (3, SUMS, "")],
)
def test_equals_one_process(degree, variants, extra, single, corpus, tmp_path):
    extra = f"{ROWS} --parallelism.context_parallel_degree {degree} {extra}"
    run_on_ranks(degree, train_all, str(corpus), str(tmp_path), variants, extra)
    assert_same_runs(tmp_path, single, variants)
