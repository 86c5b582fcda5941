"""Heads split over 2, 3 and 4 gloo processes: every mixer trains as on one process; what cannot be split is refused."""

from tests.parallel.parity import assert_layouts_equal_one_process
from tests.parallel.test_context_parallel import ONE_BLOCK
from torchlmoe.mixers import MIXERS

HEADS = "--parallelism.tensor_parallel_degree"


def test_quick(corpus, tmp_path):
    variants = {name: f"{ONE_BLOCK} --model.mixer {name}" for name in MIXERS}
    assert_layouts_equal_one_process({2: {"tp": (variants, f"{HEADS} 2")}}, corpus, tmp_path, steps=3, float32=())
