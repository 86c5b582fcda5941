"""kernels/README.md lists the kernels, and no mixer's recurrence falls back on a GPU to what is slower."""

from pathlib import Path

import pytest

from benchmarks import kernels_page
from torchlmoe.mixers import MIXERS


def test_table_is_up_to_date():
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    assert kernels_page.table() in text, "run python -m benchmarks.kernels_page"


@pytest.mark.parametrize("mixer", MIXERS)
def test_recurrences_run_on_kernels(mixer):
    """But the online gradients of TTT and Titans, softmax attention, and GateLoop's phases, which are float64."""
    plain = {"linear_recurrence", "elementwise_recurrence", "causal_conv"} & kernels_page.operations_of(mixer)
    assert plain == ({"linear_recurrence"} if mixer == "gateloop" else set())
