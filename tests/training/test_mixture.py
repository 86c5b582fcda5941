"""A run on several datasets: the shares of each, and the same rows on any number of ranks and after a checkpoint."""

import json

import numpy as np
import pytest

from tests.checkpoint.conftest import SMALL, assert_same_steps, process_group, records, stopped_at_step  # noqa: F401
from tests.conftest import run_on_ranks
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

WEIGHTS = {"tales": 0.6, "code": 0.3, "proofs": 0.1}
WORDS = {"tales": "Call me Ishmael, or whale.", "code": "for i in range(7): i += 1", "proofs": "Let p be a prime > 2."}

pytestmark = pytest.mark.usefixtures("process_group")


def write_sources(folder):
    """Write sources of very different lengths, so that the shortest starts again many times."""
    for name, num_documents in (("tales", 40), ("code", 60), ("proofs", 5)):
        texts = [f"{number}. " + WORDS[name] * (1 + number % 5) for number in range(num_documents)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def trained(place, run):
    """The trainer, at its end, of a run on the mixture: place has the sources, run is the dump folder's name."""
    tables = [f'{{dataset = "{place}/{name}.jsonl", weight = {weight}}}' for name, weight in WEIGHTS.items()]
    data = ["--data.mixture", f"[{', '.join(tables)}]", "--data.cache_dir", f"{place}/cache"]
    trainer = Trainer(
        load_config([*SMALL, *data, "--job.dump_folder", f"{place}/{run}", "--training.dtype", "float64"])
    )
    trainer.train()
    return trainer


def test_a_run_on_a_mixture(tmp_path):
    write_sources(tmp_path)
    order = trained(tmp_path, "one").order
    counts = np.bincount(np.concatenate([order.rows_of_step(step).sources for step in range(1000)]))
    assert counts / counts.sum() == pytest.approx(list(WEIGHTS.values()), rel=0.01)
    last = records(tmp_path / "one")[-1]
    counts = order.rows_of_sources(8 * 4)
    assert [last[f"data/{name}.jsonl/share"] for name in WEIGHTS] == [count / 32 for count in counts]

    stopped_at_step(4, tmp_path / "one", tmp_path / "again")
    trained(tmp_path, "again")
    assert records(tmp_path / "again") == records(tmp_path / "one")
    stopped_at_step(4, tmp_path / "one", tmp_path / "one_to_four")
    run_on_ranks(4, trained, tmp_path, "one_to_four")
    assert_same_steps(tmp_path / "one_to_four", tmp_path / "one")
    assert records(tmp_path / "one_to_four")[-1]["tokens_seen"] == last["tokens_seen"]
