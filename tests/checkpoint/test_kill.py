"""A few rounds of the kill loop; `python -m tests.checkpoint.kill_loop 50` runs many, and of several ranks."""

import pytest

from tests.checkpoint.kill_loop import LAYOUTS, ONE_PROCESS, kill_loop


def test_killed_runs_resume_with_the_same_numbers(corpus, tmp_path):
    counts = kill_loop(6, 2, ONE_PROCESS, corpus, tmp_path)
    assert counts["kills"] >= 5
    assert counts["checkpoints checked"] > 0


@pytest.mark.long
def test_killed_ranks_end_the_others_and_resume_with_the_same_numbers(corpus, tmp_path):
    counts = kill_loop(60, 6, LAYOUTS, corpus, tmp_path)
    assert counts["kills"] >= 60
    assert counts["runs"] >= len(LAYOUTS)
    assert counts["kills of all ranks"] > 0
    assert counts["ranks that ended by themselves"] > 0
    assert counts["checkpoints checked"] > 0
