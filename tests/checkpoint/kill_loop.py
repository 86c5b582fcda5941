"""Kills runs with SIGKILL at random moments and starts them again: python -m tests.checkpoint.kill_loop [kills]

After every kill each published checkpoint is whole, and a finished run equals the one that was never killed: the
figures of each step bit for bit, and the tensors of the last checkpoint.
"""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.checkpoint.conftest import arguments, records
from tests.conftest import PRELOADED
from torchlmoe.checkpoint.folders import published
from torchlmoe.checkpoint.manifest import verify
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

MODES = {
    "saves every step": "--checkpoint.interval 1 --checkpoint.keep_latest_k 1",
    "saves every third step in the background": "--checkpoint.interval 3 --checkpoint.async_mode async",
    "saves every seventh step": "--checkpoint.interval 7",
}
STEPS = "--training.steps 40 --training.deterministic true --moe.balance loss_free"


def kill_loop(num_kills: int, kills_per_run: int, corpus: Path, folder: Path, seed: int = 0) -> Counter:
    """Runs in turn in each of MODES, each killed so many times if it lasts, until there are enough; counts the hits."""
    # Its processes start from one that has imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    draw, counts = random.Random(seed), Counter()
    seconds: dict[str, float] = {}
    while counts["kills"] < num_kills:
        for mode, settings in MODES.items():
            whole, killed = folder / f"whole, {mode}", folder / f"killed, {mode}"
            extra = f"{STEPS} {settings}"
            if mode not in seconds:
                process, ready = _start(context, corpus, whole, extra)
                ready.poll(None)
                begin = time.monotonic()
                process.join()
                seconds[mode] = time.monotonic() - begin
            shutil.rmtree(killed, ignore_errors=True)
            counts["runs"] += 1
            for kills_left in itertools.count(kills_per_run, -1):
                process, ready = _start(context, corpus, killed, extra)
                if draw.random() < 0.9:  # the others may fall into the start, loading included
                    ready.poll(None)
                process.join(draw.uniform(0.0, seconds[mode] / 2) if kills_left > 0 else None)
                if process.exitcode is not None:
                    assert process.exitcode == 0, f"ended with exit code {process.exitcode}"
                    break
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                counts["kills"] += 1
                _count(counts, killed / "checkpoints")
            assert records(killed) == records(whole), mode
            first, second = (max(published(path / "checkpoints").items())[1] for path in (killed, whole))
            name = "shard-00001-model-00001-of-00001.safetensors"
            torch.testing.assert_close(load_file(first / name), load_file(second / name), rtol=0, atol=0)
    return counts


def _start(context, corpus: Path, folder: Path, extra: str):
    """A process that trains, and what it writes to once it begins with that."""
    ready, begun = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(begun, corpus, folder, extra))
    process.start()
    begun.close()
    return process, ready


def _train(begun, corpus: Path, folder: Path, extra: str) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    trainer = Trainer(load_config(arguments(corpus, folder, extra)))
    begun.send(None)
    trainer.train()


def _count(counts: Counter, root: Path) -> None:
    for path in published(root).values():
        verify(path)
        counts["checkpoints checked"] += 1
    names = [path.name for path in root.iterdir()] if root.exists() else []
    counts["kills within a save"] += any(not name[5:].isdigit() for name in names)
    counts["kills before the first checkpoint"] += not published(root)


if __name__ == "__main__":
    import json

    num_kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus"
        corpus.mkdir()
        for split in ("train", "validation"):
            texts = [f"{number}: {'Call me Ishmael. ' * (number % 9)}" for number in range(200)]
            (corpus / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        begin = time.monotonic()
        counts = kill_loop(num_kills, 8, corpus, Path(temporary))
        print(", ".join(f"{count:,} {what}" for what, count in counts.items()), f"in {time.monotonic() - begin:.0f} s")
