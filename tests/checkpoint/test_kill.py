"""A few rounds of the kill loop; `python -m tests.checkpoint.kill_loop 50` runs many."""

from tests.checkpoint.kill_loop import kill_loop


def test_killed_runs_go_on_as_if_nothing_had_been(corpus, tmp_path):
    counts = kill_loop(6, 2, corpus, tmp_path)
    assert counts["kills"] >= 5
    assert counts["checkpoints checked"] > 0
