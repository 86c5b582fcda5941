"""When a rank is lost, late or ends by an error, every other one says which it is and what it was at."""

import multiprocessing
import os
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from tests.conftest import PRELOADED
from torchlmoe.parallel import heartbeat
from torchlmoe.parallel.failures import collective_failures
from torchlmoe.parallel.heartbeat import Heartbeat
from torchlmoe.parallel.mesh import join_launch, start_process_group
from torchlmoe.parallel.verdict import ENDED, FAILED, RUNNING, Report, judge

INTERVAL = 0.4
TIMEOUT = 2.0
WORLD_SIZE = 3
HERE = r"step 3 \(optimizer\)"
LOST = r"is lost \(killed, stopped or cut off\), last seen in"


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise OSError("No space left on device\nsecond line")


def print_messages():
    """Hangs as a collective of NCCL does, without an error."""
    said = []
    heartbeat.logger.addFilter(lambda record: said.append(record.getMessage()))
    end = time.monotonic() + 60
    while not said and time.monotonic() < end:
        time.sleep(0.05)
    raise ValueError(*said)


def sleep():
    time.sleep(60)


# What happens to which rank, in step 3 (optimizer) of all, and what the others then say.
FAULTS = {
    "killed": (kill, 2, f"Another rank ended during {HERE}: rank 2 {LOST} {HERE}; earlier check"),
    "stopped": (stop, 2, f"did not end within parallelism.timeout_seconds = 2: rank 2 {LOST} {HERE}; earlier check"),
    "own error": (fail, 2, f"rank 2 ended in {HERE}: No space left on device; earlier check"),
    "own error, serves": (fail, 0, f"rank 0 ended in {HERE}: No space left on device; earlier check"),
    "killed, serves": (kill, 0, f"rank 0, whose process serves the store .*; this rank was in {HERE}; earlier check"),
    "stopped, serves": (
        stop,
        0,
        f"timeout_seconds = 2: rank 0, whose process serves the store .*; this rank was in {HERE}; earlier check",
    ),
    "late": (
        sleep,
        2,
        rf"timeout_seconds = 2: rank 2 is late, last seen in {HERE}, while rank \d was in step 3 \(saving\); earl",
    ),
    "stopped, NCCL": (stop, 2, rf"ValueError: rank \d has been in {HERE} for \d seconds: rank 2 {LOST} {HERE}\.$"),
    "stuck beside": (
        None,
        2,
        r": rank 2 is late or stuck, last seen in step 4 \(data\), while step 3 is saved; earlier check",
    ),
}


def run_with(fault: str, rank: int, port: int, folder: Path, served: bool) -> None:
    """Run one rank of a run in which one rank has a fault, and write its messages to a file."""
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{WORLD_SIZE}", MASTER_ADDR="localhost", MASTER_PORT=f"{port}")
    # Launchers of nodes may count attempts differently.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE=f"{served}", TORCHELASTIC_RESTART_COUNT="0" if served else f"{rank}")
    torch.set_num_threads(1)
    heartbeat.INTERVAL = INTERVAL
    try:
        with Heartbeat() as beating, collective_failures(beating, TIMEOUT):
            launch = join_launch(60)
            beating.start(*launch, TIMEOUT if fault == "stopped, NCCL" else None)
            start_process_group(torch.device("cpu"), 60, launch)
            other_group = dist.new_group(timeout=timedelta(seconds=60))
            dist.barrier()
            _set_pg_timeout(timedelta(seconds=TIMEOUT), other_group if fault == "stuck beside" else dist.group.WORLD)
            steps(fault, rank, beating, other_group)
    except Exception as error:
        (folder / f"{rank}.said").write_text(f"{type(error).__name__}: {error}")
        os._exit(2)


def steps(fault: str, rank: int, beating: Heartbeat, other_group: dist.ProcessGroup) -> None:
    what, victim, _ = FAULTS[fault]
    for step in range(1, 10):
        for operation in ("data", "optimizer"):
            beating.at(operation, step)
            if (step, operation) == (3, "optimizer"):
                time.sleep(2 * INTERVAL)  # until that is reported
                if fault == "late" and rank != victim:
                    beating.at("saving", step)
                elif fault == "stuck beside":
                    if rank == victim:
                        beating.beside = lambda: ", while step 3 is saved"
                        beating.at("data", step + 1)
                    else:
                        dist.barrier(other_group)
                elif rank == victim:
                    what()
                elif fault == "stopped, NCCL":
                    print_messages()
            dist.all_reduce(torch.ones(1000))


def test_every_rank_names_the_one_that_failed(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    stores, processes = [], {}
    try:
        for fault, (_, victim, _) in FAULTS.items():
            (tmp_path / fault).mkdir()
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            is_launchers = victim != 0
            if is_launchers:
                stores.append(store)
            for rank in range(WORLD_SIZE):
                processes[fault, rank] = context.Process(
                    target=run_with, args=(fault, rank, store.port, tmp_path / fault, is_launchers)
                )
            del store  # whose port rank 0 takes over, if it serves
            for rank in range(WORLD_SIZE):
                processes[fault, rank].start()
        for (fault, rank), process in processes.items():
            what, victim, sentence = FAULTS[fault]
            if rank == victim and what in (kill, stop, sleep):
                continue
            process.join(60)
            assert process.exitcode == 2, (fault, rank)
            said = (tmp_path / fault / f"{rank}.said").read_text()
            if rank == victim and what is not None:
                assert said.startswith("OSError: No space left"), (fault, said)
            else:
                assert re.search(sentence, said), (fault, rank, said)
                assert "\n" not in said
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def reports(*lines: str) -> list[Report | None]:
    """Of lines such as "5 12 running": beat, moves and state; "" for a rank without a report."""
    return [
        Report(int(beat), int(moves), f"operation {moves}", state) if beat else None
        for beat, moves, state in (line.split() or ("", "", "") for line in lines)
    ]


ALIVE, BEHIND, OTHER = f"5 12 {RUNNING}", f"5 11 {RUNNING}", f"9 12 {FAILED}"
GONE = "lost (killed, stopped or cut off), last seen in"


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ([OTHER, f"4 11 {RUNNING}", ALIVE], f"rank 1 is {GONE} operation 11"),
        ([OTHER, f"4 11 {RUNNING}", f"4 9 {RUNNING}"], f"ranks 1 and 2 are {GONE} operation 11 and operation 9"),
        ([OTHER, BEHIND, ALIVE], "rank 1 is late, last seen in operation 11, while rank 0 was in operation 12"),
        # Who has failed, or ended as it should, is not to blame, whether or not it still reports.
        ([OTHER, f"4 11 {FAILED}", ALIVE], "rank 2 is late or stuck, last seen in operation 12"),
        ([OTHER, f"4 13 {ENDED}", f"4 11 {FAILED}"], None),
        ([OTHER, ALIVE, ALIVE], None),
        ([OTHER, "", ""], "ranks 1 and 2 are missing: not started, or ended before the first report"),
        ([OTHER, *[f"4 3 {RUNNING}"] * 10], f"ranks 1, 2, 3, 4, 5, 6, 7, 8 and 2 more are {GONE} operation 3"),
    ],
)
def test_verdicts(now, verdict):
    before = reports(*[f"4 1 {RUNNING}" if line else "" for line in now])
    assert judge(0, before, reports(*now)) == verdict


def test_a_single_process_reports_nothing():
    with Heartbeat() as beating:
        beating.start(dist.HashStore(), 0, 1)
        beating.at("data", 1)
        assert beating.where == "step 1 (data)"
        assert beating.cause() is None
        assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_an_error_within_a_pipelines_stage_is_taken_out():
    """torch.distributed.pipelining wraps it in one that prints the stage's inputs."""
    for inner, outer in (
        (ValueError("token 9 is out of range"), ValueError),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:7."), ConnectionError),
        (RuntimeError("Application timeout caused pair closure"), TimeoutError),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL"), TimeoutError),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), ConnectionError),
    ):
        wrapped = RuntimeError("\n  [Stage 1] failed to run forward:\n  args: ...")
        wrapped.__cause__ = inner
        with pytest.raises(outer) as error, collective_failures(Heartbeat(), TIMEOUT):
            raise wrapped
        assert "failed to run" not in str(error.value)
