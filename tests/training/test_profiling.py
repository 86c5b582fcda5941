"""Traces of the steps that were asked for, which name the operations; no snapshot where there is no CUDA."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.training.test_trainer import run_train
from torchlmoe.config.settings import Profiling
from torchlmoe.training.profiling import StepProfiler


def test_traces_name_the_recurrence_and_its_backward(corpus, tmp_path):
    result = run_train(
        corpus, tmp_path, *"--validation.enable false --profiling.enable true --profiling.first_step 2".split(),
        *"--profiling.num_steps 1 --profiling.interval 3".split(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    traces = sorted((tmp_path / "profile").iterdir())
    assert [path.name for path in traces] == ["step_2_rank_0.json.gz", "step_5_rank_0.json.gz"]
    for path in traces:
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        names = [event.get("name") for event in events]
        assert names.count("torchlmoe::linear_recurrence") == 1  # one block of one step
        assert names.count("torchlmoe::linear_recurrence_backward") == 1


@pytest.mark.parametrize(("done", "names"), [(0, ["step_2", "step_5"]), (1, ["step_2", "step_5"]), (3, ["step_5"])])
def test_steps_are_those_of_the_run(done, names, tmp_path):
    settings = Profiling(enable=True, first_step=2, num_steps=1, interval=3)
    profiler = StepProfiler(settings, tmp_path, 0, torch.device("cpu"), done)
    for _ in range(done, 6):
        torch.ones(2).sum()
        profiler.step()
    profiler.stop()
    assert sorted(path.name.partition("_rank")[0] for path in (tmp_path / "profile").iterdir()) == names


def test_snapshot_needs_cuda(tmp_path):
    settings = Profiling(enable=True, memory_snapshot=True)
    with pytest.raises(ValueError, match="memory_snapshot = true needs CUDA"):
        StepProfiler(settings, Path(tmp_path), 0, torch.device("cpu"))
