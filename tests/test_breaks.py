"""The table of breaks (`tests/breaks.py`) fits the code and docs/testing.md."""

from tests.breaks import BREAKS, ROOT


def test_each_break_changes_code_that_exists():
    assert [x.what for x in BREAKS if x.right not in (ROOT / x.file).read_text()] == []


def test_the_page_lists_each_break():
    page = (ROOT / "docs" / "testing.md").read_text()
    assert [x.what for number, x in enumerate(BREAKS, 1) if f"| {number} | {x.what} |" not in page] == []
