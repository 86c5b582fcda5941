"""Trains the debug model with every mixer, pure and as LLLN hybrid, on equal tokens: python -m benchmarks.mixers

Each run is one process with one thread, and `--parallel` of them run at a time. The file of --output is written after
each run; runs that it already has are skipped. At the end a picture is drawn beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.report import arguments, show
from torchlmoe.config.load import load_config
from torchlmoe.data.tokenizer import load_tokenizer
from torchlmoe.mixers import MIXERS
from torchlmoe.model.decoder import build_on_meta, count_parameters

CONFIG = "train_configs/debug.toml"
PATTERNS = ("L", "LLLN")


def settings(mixer: str, pattern: str, steps: int, expert_dim: int) -> list[str]:
    """Return the flags of a run: the debug recipe with AdamW in float32, the same for all mixers."""
    pairs = {
        "moe.expert_dim": expert_dim,
        "model.mixer": mixer,
        "model.layer_pattern": pattern,
        "model.layers.L.mlp_token_shift": "false",
        "model.layers.N.mlp_token_shift": "false",
        "training.steps": steps,
        "training.dtype": "float32",
        "training.local_batch_size": 4,
        "training.seq_len": 512,
        "optimizer.name": "adamw",
        "optimizer.lr": 3e-3,
        "lr_scheduler.warmup_steps": steps // 10,
        "validation.interval": steps,
        "data.validation_max_tokens": 49152,
        "checkpoint.enable": "false",
        "metrics.plot": "false",
        "metrics.tensorboard": "false",
    }
    return ["--job.config_file", CONFIG, *(f"--{name}={value}" for name, value in pairs.items())]


def parameters(mixer: str, pattern: str, expert_dim: int, *, active: bool = False) -> int:
    vocab_size = load_tokenizer("embedded").vocab_size
    model = build_on_meta(load_config(settings(mixer, pattern, 10, expert_dim)), vocab_size)
    return count_parameters(model, active=active)


def fitting_expert_dim(mixer: str, pattern: str) -> int:
    """Return the width of experts with which the model's size is nearest to that of the default model.

    A multiple of 4, as grouped products need.
    """
    wanted = parameters("gated_deltanet", "L", 128)
    return min(range(64, 193, 4), key=lambda width: abs(parameters(mixer, pattern, width) - wanted))


def train(mixer: str, pattern: str, steps: int) -> dict[str, Any]:
    expert_dim = fitting_expert_dim(mixer, pattern)
    chosen = settings(mixer, pattern, steps, expert_dim)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "train.py", *chosen, "--job.dump_folder", folder],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(record["tokens_per_second"] for record in records[1:])
    return {
        "mixer": mixer,
        "pattern": pattern,
        "expert_dim": expert_dim,
        "parameters M": parameters(mixer, pattern, expert_dim) / 1e6,
        "active M": parameters(mixer, pattern, expert_dim, active=True) / 1e6,
        "tokens": records[-1]["tokens_seen"],
        "tokens/s": speeds[len(speeds) // 2],
        "bits/byte": records[-1]["val_bits_per_byte"],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte over speed, a colour per pattern."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PATTERNS), figsize=(13, 6), layout="constrained")
    for axis, pattern in zip(axes, PATTERNS, strict=True):
        chosen = [row for row in rows if row["pattern"] == pattern]
        names = [row["mixer"] for row in sorted(chosen, key=lambda row: row["bits/byte"])]
        values = [row["bits/byte"] for row in sorted(chosen, key=lambda row: row["bits/byte"])]
        axis.barh(names, values, color=["tab:orange" if name == "attention" else "tab:blue" for name in names])
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.3f}", va="center", fontsize=8)
        axis.set(title=f"layer_pattern {pattern}", xlabel="validation bits per byte", xlim=(1.5, max(values) * 1.04))
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of 2048 tokens")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), help="which; all if unset")
    options = parser.parse_args()
    held = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    rows = held["rows"] if held.get("steps") == options.steps else []
    done = {(row["mixer"], row["pattern"]) for row in rows}
    cases = [
        (mixer, pattern)
        for pattern in PATTERNS
        for mixer in options.mixers
        if (mixer, pattern) not in done and (mixer, pattern) != ("attention", "LLLN")
    ]
    with ThreadPoolExecutor(options.parallel) as pool:
        for row in pool.map(lambda case: train(*case, options.steps), cases):
            rows.append(row)
            rows.sort(key=lambda row: (PATTERNS.index(row["pattern"]), row["bits/byte"]))
            print(f"{row['mixer']} {row['pattern']}: {row['bits/byte']:.3f} bits per byte", flush=True)
            if options.output:
                show("Mixers at equal tokens", rows, options.output, steps=options.steps)
    if options.output:
        draw(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
