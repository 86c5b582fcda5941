"""Failures while training: each ends with one sentence, in bounded time, and saved checkpoints stay complete."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.checkpoint.conftest import Run, arguments, latest, records, tensors, train
from tests.conftest import files_at_most
from torchlmoe.checkpoint.folders import published
from torchlmoe.checkpoint.manifest import verify
from torchlmoe.config.load import load_config
from torchlmoe.training.stop_request import StopRequest
from torchlmoe.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
LOST = r"is lost \(killed, stopped or cut off\), last seen in step \d+ \(\w[a-z ]+\)"
pytestmark = pytest.mark.usefixtures("process_group")


def all_whole(folder):
    for path in published(folder / "checkpoints").values():
        verify(path)
    return list(published(folder / "checkpoints"))


def with_bad_step(corpus, folder, extra, bad_step, spoil):
    trainer = Trainer(load_config(arguments(corpus, folder, extra)))

    def hook(*_):
        if trainer.progress.step == bad_step - 1:
            return spoil(trainer)

    trainer.model.register_forward_hook(lambda module, inputs, output: output * hook() if hook() else output)
    return trainer


def test_non_finite_loss_stops(corpus, tmp_path):
    trainer = with_bad_step(corpus, tmp_path, "--checkpoint.async_mode async", 6, lambda _: float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss is nan .* at step 6; .* checkpoint is of step 4\.") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert all_whole(tmp_path) == [4]
    for parameter in trainer.model.parameters():
        assert parameter.isfinite().all()


def test_non_finite_gradient_is_skipped_and_counted(corpus, tmp_path):
    def bad_gradient(trainer):
        next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        return 1.0

    extra = "--training.non_finite skip --training.local_batch_size 4 --moe.balance loss_free"
    trainer = with_bad_step(corpus, tmp_path, extra, 3, bad_gradient)
    weights = {}
    trainer.optimizer.register_step_post_hook(
        lambda *_: weights.update(step=trainer.progress.step, sum=[p.sum().item() for p in trainer.model.parameters()])
    )
    for index in range(3):
        trainer.train_step(index)
    assert weights == {"step": 1, "sum": [p.sum().item() for p in trainer.model.parameters()]}
    assert trainer.progress.skipped_steps == 1
    trainer.loader.close()


def test_skipped_steps_are_counted_through_a_checkpoint(corpus, tmp_path):
    extra = "--training.non_finite skip"
    with_bad_step(corpus, tmp_path, extra, 3, lambda _: float("nan")).train()
    rows = records(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert ["loss" in row for row in rows] == [True, True, False, True, True, True, True, True]
    shutil.rmtree(tmp_path / "checkpoints/step-00000008")
    assert train(corpus, tmp_path, extra).progress.skipped_steps == 1


def tokens_file(trainer):
    return trainer.loader.order.sources[0].store.folder / "tokens_00000.bin"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: os.truncate(path, 4096), r"tokens_00000\.bin has 4096 bytes in place of"),
        (Path.unlink, r"tokens_00000\.bin is missing or cannot be read"),
        (lambda path: os.truncate(path.with_name("documents.bin"), 8), r"documents\.bin has 8 bytes in place of"),
    ],
)
def test_data_that_vanishes(damage, sentence, corpus, tmp_path):
    extra = f"--data.cache_dir {tmp_path}/cache --training.steps 100"
    trainer = Trainer(load_config(arguments(corpus, tmp_path / "run", extra)))
    trainer.optimizer.register_step_post_hook(
        lambda *_: damage(tokens_file(trainer)) if trainer.progress.step == 5 else None
    )
    with pytest.raises(ValueError, match=sentence) as error:
        trainer.train()
    assert "the tokens are built again" in str(error.value)
    assert trainer.progress.step < 12
    assert all_whole(tmp_path / "run")[:1] == [4]


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_full_disk_for_a_checkpoint(async_mode, corpus, tmp_path):
    extra = f"--training.steps 100 --checkpoint.interval 10 --checkpoint.async_mode {async_mode}"
    trainer = Trainer(load_config(arguments(corpus, tmp_path, extra)))
    limit = files_at_most(1_000_000)
    trainer.optimizer.register_step_post_hook(lambda *_: limit.__enter__() if trainer.progress.step == 15 else None)
    try:
        with pytest.raises(
            OSError, match=r"checkpoint of step 20 could not be written to .*: File too large; what was"
        ):
            trainer.train()
    finally:
        limit.__exit__(None, None, None)
    assert trainer.progress.step == 20 if async_mode == "disabled" else 20 <= trainer.progress.step < 30
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert all_whole(tmp_path) == [10]


@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_full_disk_for_figures(tensorboard, corpus, tmp_path, monkeypatch):
    said, threads = [], set(threading.enumerate())
    monkeypatch.setattr("threading.excepthook", said.append)
    extra = f"--checkpoint.enable false --metrics.tensorboard {tensorboard}"
    trainer = Trainer(load_config(arguments(corpus, tmp_path, extra)))
    if tensorboard == "true":
        monkeypatch.setattr(trainer.log, "_write", lambda records: None)
    with (
        files_at_most(2000),
        pytest.raises(OSError, match=r"figures of step \d could not be written .* File too large"),
    ):
        trainer.train()
    assert not said
    with FileLock(tmp_path / ".lock", timeout=0):  # in this process, another run can begin
        assert not [thread for thread in set(threading.enumerate()) - threads if "train_loader" in thread.name]


def test_a_constructor_that_fails_releases_what_it_holds(corpus, tmp_path):
    extra = "--checkpoint.enable false --profiling.enable true --profiling.memory_snapshot true"
    with pytest.raises(ValueError, match="memory_snapshot = true needs CUDA") as error:
        Trainer(load_config(arguments(corpus, tmp_path, extra)))
    with FileLock(tmp_path / ".lock", timeout=0):
        assert error  # which still holds the half-built trainer


def test_the_death_of_torchrun_asks_for_an_end(monkeypatch):
    by_launcher = {"TORCHELASTIC_RUN_ID": "none"}
    for environment, name in ((by_launcher, "the death of torchrun"), ({}, None)):
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        with monkeypatch.context() as patch, StopRequest() as stop:
            assert stop.name is None
            patch.setattr(os, "getppid", lambda: 1)  # who takes orphans in
            assert stop.name == name


def sentence(stderr):
    assert "Traceback" not in stderr
    return stderr.strip().splitlines()[-1]


def test_signals_save_and_end(corpus, tmp_path):
    saving, other = tmp_path / "saving", tmp_path / "other"
    with (
        Run(corpus, saving, "--checkpoint.interval 1000000") as first,
        Run(corpus, other, "--checkpoint.enable false") as second,
    ):
        first.wait_for_step(5)
        first.ranks[0].send_signal(signal.SIGTERM)
        code, out, err = first.ranks[0].result()
        assert code == 0, err
        (step,) = all_whole(saving)
        assert out.splitlines()[-1].startswith(f"Stopped after step {step} by SIGTERM: saved in ")
        assert len(records(saving)) == step
        assert not (saving / "finished").exists()  # make train resume

        second.wait_for_step(5)
        second.ranks[0].send_signal(signal.SIGINT)
        code, out, err = second.ranks[0].result()
        assert code == 0, err
        assert "by SIGINT: nothing was saved, since checkpoint.enable is false." in out.splitlines()[-1]
        assert not (other / "checkpoints").exists()


def test_a_second_request_ends_at_once():
    code = """
import os, signal, time
from torchlmoe.training import stop_request
stop_request.SECONDS_OF_ONE_REQUEST = 0.5
with stop_request.StopRequest() as stop:
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # a launcher's way of passing one request on
        os.kill(os.getpid(), number)
    print(stop.name, flush=True)
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("SIGINT\n", 128 + signal.SIGTERM)


def test_one_ranks_signal_stops_all(corpus, tmp_path):
    stopped_by_one_rank(corpus, tmp_path, "", 5)


def test_one_stages_signal_stops_all_and_the_same_command_resumes(corpus, tmp_path):
    pipeline = "--parallelism.pipeline_parallel_degree 2"
    first, _ = stopped_by_one_rank(corpus, tmp_path, pipeline, 5)
    second, said = stopped_by_one_rank(corpus, tmp_path, pipeline, first + 2)
    assert f"step-{first:08d}: {first} steps are done." in said
    assert [record["step"] for record in records(tmp_path)] == list(range(1, second + 1))


def stopped_by_one_rank(corpus, folder, extra, at_step):
    """The step that a run of two ranks has saved when one of them was sent SIGTERM, and what the first one logged."""
    with Run(corpus, folder, extra, world_size=2) as run:
        run.wait_for_step(at_step)
        run.ranks[1].send_signal(signal.SIGTERM)
        results = [rank.result() for rank in run.ranks]
    assert [result.returncode for result in results] == [0, 0], results
    step = all_whole(folder)[-1]
    assert f"Stopped after step {step} by a signal to another rank: saved in " in results[0].stdout
    return step, results[0].stderr


def test_a_killed_rank_ends_the_others(corpus, tmp_path):
    with Run(corpus, tmp_path, "--checkpoint.async_mode async", world_size=2) as run:
        run.wait_for_step(10)  # the save of step 8 has waited for that of step 4
        run.ranks[1].send_signal(signal.SIGKILL)
        code, _, err = run.ranks[0].result()
        assert code == 2
    assert re.match(rf"error \(rank 0\): Another rank ended during step .*: rank 1 {LOST}", sentence(err))
    assert all_whole(tmp_path)


def test_a_stuck_rank_ends_the_others_after_the_timeout(corpus, tmp_path):
    with Run(corpus, tmp_path, "--parallelism.timeout_seconds 4", world_size=2) as run:
        run.wait_for_step(6)
        run.ranks[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        code, _, err = run.ranks[0].result()
        assert code == 2
    assert re.search(rf"did not end within parallelism\.timeout_seconds = 4: rank 1 {LOST}", sentence(err))
    assert time.monotonic() - begin < 30
    assert all_whole(tmp_path)


def on_eight_ranks(corpus, folder):
    """A mesh of tp 2, pp 2 and dp 2."""
    layout = """--parallelism.tensor_parallel_degree 2 --parallelism.pipeline_parallel_degree 2
        --parallelism.timeout_seconds 20 --training.deterministic true --checkpoint.async_mode async"""
    return Run(corpus, folder, layout, world_size=8, steps=40)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run on eight ranks to which nothing happens."""
    folder = tmp_path_factory.mktemp("eight") / "whole"
    with on_eight_ranks(corpus, folder) as run:
        assert [rank.result(300).returncode for rank in run.ranks] == [0] * 8
    return folder


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_signal_to_one_of_eight_ranks(number, whole, corpus, tmp_path):
    """The others name the lost rank, or all ranks stop. The same command then resumes bit for bit."""
    folder = tmp_path / "run"
    with on_eight_ranks(corpus, folder) as run:
        run.wait_for_step(10)
        run.ranks[5].send_signal(number)
        begin = time.monotonic()
        for index, rank in enumerate(run.ranks):
            if number == signal.SIGTERM:
                assert rank.result(300).returncode == 0
            elif index != 5:
                code, _, err = rank.result(300)
                assert code == 2
                assert re.search(f"rank 5 {LOST}", sentence(err)), (index, err)
        assert time.monotonic() - begin < 20 + 60
    assert 10 <= len(records(folder)) < 40
    assert all_whole(folder)
    with on_eight_ranks(corpus, folder) as again:
        assert [rank.result(300).returncode for rank in again.ranks] == [0] * 8
    assert records(folder) == records(whole)
    torch.testing.assert_close(tensors(latest(folder)), tensors(latest(whole)), rtol=0, atol=0)
