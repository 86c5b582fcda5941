"""Kills ranks of runs with SIGKILL at random moments and starts the runs again.

    python -m tests.checkpoint.kill_loop 50              runs of one process
    python -m tests.checkpoint.kill_loop 60 --layouts    runs of several ranks, of which one is killed, sometimes all

The ranks that are left end by themselves, with a sentence and a code that is not zero. After every kill each published
checkpoint is whole, and a finished run equals the one that was never killed: the figures of each step bit for bit, and
the tensors of the last checkpoint.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.checkpoint.conftest import Run, latest, records, tensors
from tests.conftest import SECONDS_OF_A_HANG, write_corpus
from tests.parity_matrix import Layout
from torchlmoe.checkpoint.folders import published
from torchlmoe.checkpoint.manifest import verify

STEPS = 24
SETTINGS = f"--training.steps {STEPS} --training.deterministic true --moe.balance loss_free"
EVERY_STEP = "--checkpoint.interval 1 --checkpoint.keep_latest_k 1"
IN_THE_BACKGROUND = "--checkpoint.interval 3 --checkpoint.async_mode async"
EVERY_SEVENTH = "--checkpoint.interval 7"
# Its lower bounds and the embedding are on both stages where there are two.
MODEL = "--model.mixer hgrn2 --model.layer_pattern LNL --model.num_layers 3 --model.tie_embeddings true"


@dataclass(frozen=True)
class Kind:
    """Runs of a layout of `tests.parity_matrix`, with additional settings."""

    settings: str
    layout: str = ""

    @property
    def flags(self) -> str:
        return f"{SETTINGS} {self.settings} {Layout(self.layout, ()).flags}"

    @property
    def world_size(self) -> int:
        return Layout(self.layout, ()).world_size


ONE_PROCESS = {
    "saves every step": Kind(EVERY_STEP),
    "saves every third step in the background": Kind(IN_THE_BACKGROUND),
    "saves every seventh step": Kind(EVERY_SEVENTH),
}
# A rank that is killed before it has found the others is missed after the timeout alone: no launcher tells them.
LAYOUTS = {
    layout: Kind(f"{MODEL} {saves} --parallelism.timeout_seconds 30", layout)
    for layout, saves in (
        ("dp=2", IN_THE_BACKGROUND),
        ("tp=2", EVERY_STEP),
        ("pp=2", IN_THE_BACKGROUND),
        ("pp=2 dp=2 ep=2", EVERY_STEP),
        ("cp=2 tp=2", EVERY_SEVENTH),
    )
}


def kill_loop(
    num_kills: int, kills_per_run: int, kinds: dict[str, Kind], corpus: Path, folder: Path, seed: int = 0
) -> Counter:
    """Runs in turn of each kind, each killed so many times if it lasts, until there are enough; counts the hits."""
    draw, counts = random.Random(seed), Counter()
    seconds: dict[str, float] = {}
    for name, kind in itertools.cycle(kinds.items()):
        if counts["kills"] >= num_kills:
            break
        whole, killed = folder / f"whole, {name}", folder / f"killed, {name}"
        if name not in seconds:
            seconds[name] = _seconds_of(corpus, whole, kind)
        shutil.rmtree(killed, ignore_errors=True)
        counts["runs"] += 1
        for kills_left in itertools.count(kills_per_run, -1):
            with Run(corpus, killed, kind.flags, kind.world_size) as run:
                if draw.random() < 0.9:  # the others may fall into the start, loading included
                    _wait_for_start(run)
                run.ranks[0].process.join(draw.uniform(0.0, seconds[name] / 2) if kills_left > 0 else None)
                if run.ranks[0].process.exitcode is not None:
                    _wait_for_success(run)
                    break
                _kill(run, run.ranks if draw.random() < 0.2 else [draw.choice(run.ranks)], counts)
        assert records(killed) == records(whole), name
        torch.testing.assert_close(tensors(latest(killed)), tensors(latest(whole)), rtol=0, atol=0)
        print(f"{name}: equal; {counts['kills']} of {num_kills} kills", flush=True)
    return counts


def _seconds_of(corpus: Path, folder: Path, kind: Kind) -> float:
    """Of a run that is not killed, its start not counted."""
    with Run(corpus, folder, kind.flags, kind.world_size) as run:
        _wait_for_start(run)
        begin = time.monotonic()
        _wait_for_success(run)
        return time.monotonic() - begin


def _wait_for_start(run: Run) -> None:
    """Until it has loaded all and begins to train, or has ended."""
    while "metrics in" not in run.ranks[0].printed[0].read_text() and run.ranks[0].process.is_alive():
        time.sleep(0.005)


def _wait_for_success(run: Run) -> None:
    results = [rank.result(SECONDS_OF_A_HANG) for rank in run.ranks]
    assert all(result.returncode == 0 for result in results), results


def _kill(run: Run, victims: list, counts: Counter) -> None:
    for victim in victims:
        with suppress(ProcessLookupError):  # it has ended meanwhile
            victim.send_signal(signal.SIGKILL)
    results = [rank.result(SECONDS_OF_A_HANG) for rank in run.ranks]
    checkpoints = published(run.folder / "checkpoints")
    for rank, result in enumerate(results):
        if result.returncode == -signal.SIGKILL or (result.returncode == 0 and STEPS in checkpoints):
            continue
        assert result.returncode == 2, (rank, result)
        assert result.stderr.splitlines()[-1].startswith(f"error (rank {rank}): "), result.stderr
        counts["ranks that ended by themselves"] += 1
        counts["of them after the timeout"] += "did not end within" in result.stderr
    killed = sum(result.returncode == -signal.SIGKILL for result in results)
    counts["kills"] += killed > 0
    counts["kills of all ranks"] += killed == len(results) > 1
    for path in checkpoints.values():
        verify(path)
        counts["checkpoints checked"] += 1
    root = run.folder / "checkpoints"
    names = [path.name for path in root.iterdir()] if root.exists() else []
    counts["kills within a save"] += any(not name[5:].isdigit() for name in names)
    counts["kills before the first checkpoint"] += not checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", nargs="?", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--layouts", action="store_true", help="of runs of several ranks, in five layouts")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    kinds = LAYOUTS if arguments.layouts else ONE_PROCESS
    with tempfile.TemporaryDirectory() as temporary:
        corpus = write_corpus(Path(temporary) / "corpus")
        begin = time.monotonic()
        counts = kill_loop(arguments.kills, 6, kinds, corpus, Path(temporary))
        print(", ".join(f"{count:,} {what}" for what, count in counts.items()), f"in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
