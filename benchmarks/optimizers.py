"""Validation loss of the debug model with AdamW and Muon after equal training time: python -m benchmarks.optimizers

A short run measures the speed of each optimizer, which gives the number of steps in `--minutes`. The learning rate
decays over these steps. Flags give the peak learning rates, and all other settings are those of
train_configs/debug.toml.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import arguments, show
from torchlmoe.config.batch import batch_sizes
from torchlmoe.config.load import load_config

CONFIG = "train_configs/debug.toml"
PLAIN = {
    "model.mixer": "gated_deltanet",
    "model.layers.L.mlp_token_shift": "false",
    "model.layers.N.mlp_token_shift": "false",
}


def train(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train and return the records of the run."""
    settings = {"job.dump_folder": folder, "checkpoint.enable": "false", "metrics.plot": "false", **PLAIN, **settings}
    pairs = [f"--{name}={value}" for name, value in settings.items()]
    subprocess.run([sys.executable, "train.py", "--job.config_file", CONFIG, *pairs], check=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3, help="training time of each run")
    parser.add_argument("--adamw-lr", type=float, nargs="+", default=[6e-3], help="peak learning rates to try")
    parser.add_argument(
        "--matrix-lr", type=float, nargs="+", default=[2e-2], help="those of Muon, with 6e-3 for the rest"
    )
    options = parser.parse_args()
    cases = {
        "adamw": [{"optimizer.lr": lr} for lr in options.adamw_lr],
        "muon": [{"optimizer.lr": 6e-3, "optimizer.matrix_lr": lr} for lr in options.matrix_lr],
    }
    config = load_config(["--job.config_file", CONFIG])
    tokens_per_step = batch_sizes(config.training, 1)[1] * config.training.seq_len
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, choices in cases.items():
            short = {"training.steps": 60, "lr_scheduler.warmup_steps": 10, "validation.enable": "false"}
            speed = train(folder / f"{name}_speed", {"optimizer.name": name, **short})[-1]["tokens_per_second"]
            steps = round(60 * options.minutes * speed / tokens_per_step)
            for index, choice in enumerate(choices):
                settings = {"optimizer.name": name, "training.steps": steps, "validation.interval": steps, **choice}
                last = train(folder / f"{name}_{index}", settings)[-1]
                rows.append(
                    {
                        "optimizer": name,
                        "lr": choice["optimizer.lr"],
                        "matrix_lr": choice.get("optimizer.matrix_lr", choice["optimizer.lr"]),
                        "steps": steps,
                        "tokens/s": round(speed),
                        "val bits/byte": round(last["val_bits_per_byte"], 4),
                    }
                )
    show(f"Debug model, {options.minutes:g} minutes of training each", rows, options.output, config=CONFIG)


if __name__ == "__main__":
    main()
