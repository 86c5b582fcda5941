"""kernels/README.md says what is there."""

from pathlib import Path

from benchmarks import kernels_page


def test_table_is_up_to_date():
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    assert kernels_page.table() in text, "run python -m benchmarks.kernels_page"
