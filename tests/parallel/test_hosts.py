"""Two hosts: network namespaces joined by a cable, two ranks each, started by the SLURM script over real sockets.

SLURM itself is two stubs. Needs root, for the namespaces.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.checkpoint.conftest import SMALL, Run, records

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "train.slurm"
STEPS = 60
SETTINGS = f"""--training.steps {STEPS} --training.dtype float64 --training.deterministic true
--parallelism.timeout_seconds 20 --checkpoint.async_mode async"""
LOST = r"lost \(killed, stopped or cut off\), last seen in step \d+ \(\w[a-z ]+\)"

# Each host has its own home folder, and with it a token store. One that ends is started again when it is asked
# for, as by a cluster that replaces it.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
for node in 0 1; do
    export SLURM_NODEID=$node SLURMD_NODENAME=10.77.0.$((node + 1)) SLURM_GPUS_ON_NODE=2 HOME=$STUBS/home-$node
    mkdir -p "$HOME"
    (until ip netns exec "$HOSTS-$SLURM_NODEID" "$@"; do
        until rm "$STUBS/again-$SLURM_NODEID"; do sleep 0.1; done 2> /dev/null
    done) &
done
wait
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames two-hosts" ]] && printf '10.77.0.1\\n10.77.0.2\\n'
"""


class Hosts:
    """Two namespaces, `<name>-0` and `<name>-1`."""

    def __init__(self, name: str):
        self.name = name

    def connect(self) -> None:
        for host in (0, 1):
            _ip(f"netns add {self.name}-{host}")
        _ip(f"link add cable netns {self.name}-0 type veth peer name cable netns {self.name}-1")
        for host in (0, 1):
            _ip(f"-n {self.name}-{host} address add 10.77.0.{host + 1}/24 dev cable")
            self.set_link(host, "cable", "up")
            self.set_link(host, "lo", "up")

    def set_link(self, host: int, link: str, state: str) -> None:
        _ip(f"-n {self.name}-{host} link set {link} {state}")

    def kill(self, host: int) -> None:
        """All processes of the host."""
        while pids := _ip(f"netns pids {self.name}-{host}").split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)

    def remove(self) -> None:
        for host in (0, 1):
            with suppress(OSError):  # not made
                self.kill(host)
                _ip(f"netns delete {self.name}-{host}")


def _ip(arguments: str) -> str:
    result = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"ip {arguments}: {result.stderr.strip()}")
    return result.stdout


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts(f"torchlmoe-{os.getpid()}")
    try:
        try:
            hosts.connect()
        except OSError as error:  # or there is no such program
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield hosts
    finally:
        with suppress(FileNotFoundError):
            hosts.remove()


class Job:
    """The script, as SLURM runs it on its first node. What it prints is in `<folder>/job.log`."""

    def __init__(self, hosts: Hosts, corpus: Path, folder: Path):
        stubs = folder / "stubs"
        stubs.mkdir(exist_ok=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        self.hosts, self.folder, self.log, self.again = hosts, folder, folder / "job.log", stubs / "again-1"
        self.num_read = 0  # characters of the log before what is waited for
        slurm = dict(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="two-hosts", SLURM_JOB_NUM_NODES="2")
        path = f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = dict(PATH=path, HOSTS=hosts.name, STUBS=str(stubs), LOGS=str(folder / "logs"))
        settings = [*SMALL, "--data.dataset", str(corpus), "--job.dump_folder", str(folder / "run"), *SETTINGS.split()]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", SCRIPT, *settings],
                cwd=ROOT,
                env={**os.environ, **slurm, **environment, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_steps(self, more: int) -> None:
        """Until so many steps are recorded that were not when it was called."""
        before = len(records(self.folder / "run")) if (self.folder / "run/metrics.jsonl").exists() else 0
        before -= before % 4  # the run continues after its last checkpoint
        self.wait(lambda: (self.folder / "run/metrics.jsonl").exists() and self.recorded() >= before + more)

    def recorded(self) -> int:
        return (self.folder / "run/metrics.jsonl").read_text().count("\n")

    def sentences(self, expected: dict[int, str]) -> None:
        """Waits until each of these ranks has ended with one since the last time."""
        for rank, sentence in expected.items():
            ended = re.compile(rf"error \(rank {rank}\): .*{sentence}")
            self.wait(lambda ended=ended: ended.search(self.log.read_text()[self.num_read :]) is not None)
        self.num_read = len(self.log.read_text())

    def wait(self, until) -> None:
        end = time.monotonic() + 300
        while not until():
            assert time.monotonic() < end, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        """As SLURM ends a job that has lost a node."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for host in (0, 1):
            self.hosts.kill(host)


@pytest.mark.long
def test_a_lost_host_ends_the_others_and_the_run_continues(hosts, corpus, tmp_path):
    with Run(corpus, tmp_path / "whole", SETTINGS, world_size=4, steps=STEPS) as whole:
        assert [rank.result(300).returncode for rank in whole.ranks] == [0] * 4

    with Job(hosts, corpus, tmp_path) as job:
        job.wait_for_steps(6)
        hosts.kill(1)
        lost = f"ranks 2 and 3 are {LOST}"
        job.sentences(dict.fromkeys((0, 1), f"Another rank ended during step .*: {lost}"))
        job.again.touch()  # the same torchrun, without a restart of the other host's
        job.wait_for_steps(10)
        hosts.set_link(0, "cable", "down")
        # Nothing fails before the time limit. One of two ranks may then see the other one end first.
        over = r"(did not end within parallelism\.timeout_seconds = 20|Another rank ended during step .*)"
        unreachable = "rank 0, whose process serves the store .*, ended, hangs or is cut off"
        job.sentences(dict.fromkeys((0, 1), f"{over}: {lost}") | dict.fromkeys((2, 3), f"{over}: {unreachable}"))
    assert 10 < job.recorded() < STEPS
    hosts.set_link(0, "cable", "up")
    with Job(hosts, corpus, tmp_path) as job:
        assert job.process.wait(300) == 0, job.log.read_text()

    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert len(list((tmp_path / "stubs").glob("home-*/.cache/torchlmoe/*/documents.bin"))) == 2
    assert list((tmp_path / "logs/7-0/node-1").rglob("stderr.log"))
