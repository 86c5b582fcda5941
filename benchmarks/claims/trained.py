"""The claims about trained models: recall, validation loss, and experts beside dense layers.

Every run is a run of train.py in a folder under outputs/claims; a killed run resumes from its checkpoint.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.claims.record import Unit, mean_and_error, of
from benchmarks.claims.table import CLAIMS, verdict
from torchlmoe.checkpoint import open_model
from torchlmoe.config.load import load_config
from torchlmoe.evaluation.recall import evaluate_recall
from torchlmoe.files import read_toml
from torchlmoe.model.decoder import build_on_meta, count_parameters

WORK = Path("outputs/claims")
VOCABULARY = 4096  # tokens of the embedded tokenizer
RUN = {"checkpoint.enable": "true", "metrics.plot": "false", "metrics.tensorboard": "false"}


def flags(*settings: dict[str, Any]) -> list[str]:
    merged = {name: value for each in settings for name, value in each.items()}
    return [f"--{name}={value}" for name, value in merged.items()]


def train(folder: Path, *settings: dict[str, Any]) -> dict[str, Any]:
    """Return the last record of a run. The run is started or resumed unless it has finished."""
    if not (folder / "finished").exists():
        arguments = flags(RUN, *settings, {"job.dump_folder": folder})
        subprocess.run([sys.executable, "train.py", *arguments], check=True)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def folder_of(claim: str, unit: Unit) -> Path:
    return WORK / claim / "-".join(str(value).replace(" ", "_") for value in unit.values())


class Recall:
    """Accuracy of multi-query associative recall for each layout and width, by the number of pairs in a document."""

    sizes = CLAIMS["recall"].sizes
    figures = ("accuracy",)
    across, lines, panel = "pairs", "pattern", "dim"

    def units(self) -> list[Unit]:
        return [
            {"pattern": pattern, "dim": dim, "seed": seed}
            for seed in self.sizes["seeds"]
            for dim in self.sizes["dims"]
            for pattern in self.sizes["patterns"]
        ]

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Train on documents of all numbers of pairs, and evaluate each number by itself."""
        pattern, length, folder = (
            self.sizes["patterns"][unit["pattern"]],
            self.sizes["length"],
            folder_of("recall", unit),
        )
        reader = {"length": length, "vocab_size": self.sizes["vocab_size"], "min_pairs": 2}
        train(
            folder,
            self.sizes["settings"],
            {"model.mixer": self.sizes["mixer"]} if "L" in pattern else {},
            {f"model.layers.{letter}.mlp": "none" for letter in sorted(set(pattern))},
            {"model.layer_pattern": pattern, "model.dim": unit["dim"], "training.seed": unit["seed"]},
            {"data.dataset": "recall:mqar", "training.seq_len": length},
            {"validation.interval": self.sizes["settings"]["training.steps"]},
            {
                f"data.reader_options.{name}": value
                for name, value in {**reader, "num_pairs": max(self.sizes["pairs"])}.items()
            },
        )
        model, _, _ = open_model(folder)
        points = [{"num_pairs": pairs, "length": length} for pairs in self.sizes["pairs"]]
        found = evaluate_recall(
            model,
            ["mqar"],
            points={"mqar": points},
            options={"mqar": {"vocab_size": self.sizes["vocab_size"]}},
            num_documents=self.sizes["documents"],
        )["mqar"]
        cache = model.init_cache(1, length).values(include_nested=True, leaves_only=True)
        return {
            "points": [
                {"pairs": pairs, "accuracy": point["exact_match"]}
                for pairs, point in zip(self.sizes["pairs"], found["points"], strict=True)
            ],
            "state_bytes": sum(leaf.numel() * leaf.element_size() for leaf in cache),
            "recall": found,
        }

    def verdict(self, rows: list[dict[str, Any]]) -> tuple[str, str]:
        pairs, dims = max(self.sizes["pairs"]), self.sizes["dims"]

        def accuracy(pattern: str, dim: int) -> tuple[float, float]:
            points = [row["points"] for row in of(rows, pattern=pattern, dim=dim)]
            return mean_and_error([point["accuracy"] for row in points for point in row if point["pairs"] == pairs])

        (large, large_error), (small, small_error) = accuracy("pure", max(dims)), accuracy("pure", min(dims))
        checks = [(large - small, (large_error**2 + small_error**2) ** 0.5, 0.0)]
        for dim in dims:
            (pure, pure_error), (softmax, softmax_error) = accuracy("pure", dim), accuracy("softmax", dim)
            for pattern in self.sizes["patterns"]:
                if pattern not in ("pure", "softmax"):
                    hybrid, error = accuracy(pattern, dim)
                    margin = hybrid - (pure + softmax) / 2
                    checks.append((margin, (error**2 + (pure_error**2 + softmax_error**2) / 4) ** 0.5, 0.0))
        return verdict(checks), f"pure, {pairs} pairs: {small:.3f} at width {min(dims)}, {large:.3f} at {max(dims)}"


class Loss:
    """Validation loss of each mixer, pure and hybrid, and of softmax attention, each at its tuned learning rate."""

    sizes = CLAIMS["loss"].sizes
    figures = ("val_loss", "parameters")
    across, lines, panel = "length", "model", None

    def models(self) -> dict[str, tuple[str, str]]:
        named = {
            f"{mixer}, {layout}": (mixer, pattern)
            for layout, pattern in self.sizes["layouts"].items()
            for mixer in self.sizes["mixers"]
        }
        return {**named, "softmax": ("attention", "LLLL")}

    def units(self) -> list[Unit]:
        return [
            {"model": model, "length": length, "seed": seed}
            for seed in self.sizes["seeds"]
            for length in self.sizes["lengths"]
            for model in self.models()
        ]

    def settings_of(self, model: str, length: int) -> dict[str, Any]:
        mixer, pattern = self.models()[model]
        rows = self.sizes["settings"]["training.global_batch_size"] * self.sizes["settings"]["training.seq_len"]
        settings = {
            **self.sizes["settings"],
            "model.mixer": mixer,
            "model.layer_pattern": pattern,
            "training.seq_len": length,
            "training.global_batch_size": rows // length,
        }
        return {**settings, "moe.expert_dim": self.expert_dim(settings)}

    def measure(self, unit: Unit) -> dict[str, Any]:
        settings, rate = self.settings_of(unit["model"], unit["length"]), self.tuned_rate(unit["model"])
        validation = {"validation.interval": settings["training.steps"]}
        run = {"training.seed": 1 + unit["seed"], "optimizer.lr": rate, **validation}
        last = train(folder_of("loss", unit), settings, run)
        return {"val_loss": last["val_loss"], "lr": rate, "parameters": _parameters(settings), "last": last}

    def tuned_rate(self, model: str) -> float:
        """Return the learning rate that torchlmoe.tune finds at the first length. A finished search is not repeated."""
        found = folder_of("loss", {"model": model}) / "tuned.json"
        search = flags(self.settings_of(model, self.sizes["lengths"][0]), self.sizes["tune"], {"output": found})
        subprocess.run([sys.executable, "-m", "torchlmoe.tune", *search], check=True)
        return read_toml(found.with_suffix(".toml"))["optimizer"]["lr"]

    def expert_dim(self, settings: dict[str, Any]) -> int:
        """Return the width of experts with which the number of parameters is nearest to that of softmax attention."""
        wanted = _parameters({**settings, "model.mixer": "attention", "model.layer_pattern": "LLLL"})
        return min(range(64, 193, 4), key=lambda dim: abs(_parameters({**settings, "moe.expert_dim": dim}) - wanted))

    def verdict(self, rows: list[dict[str, Any]]) -> tuple[str, str]:
        checks, words = [], []
        for length in self.sizes["lengths"]:
            losses = {
                model: mean_and_error([row["val_loss"] for row in of(rows, model=model, length=length)])
                for model in self.models()
            }
            softmax, softmax_error = losses["softmax"]
            for layout, above in (("pure", self.sizes["most_above"]), ("hybrid", 0.0)):
                name, (loss, error) = min(
                    ((name, each) for name, each in losses.items() if name.endswith(layout)), key=lambda item: item[1]
                )
                limit = 1 + above
                checks.append((limit * softmax - loss, (error**2 + (limit * softmax_error) ** 2) ** 0.5, 0.0))
                words.append(f"{name} {loss:.4f} ± {error:.2g} at {length}")
            words.append(f"softmax {softmax:.4f} ± {softmax_error:.2g} at {length}")
        return verdict(checks), "; ".join(words)


def _parameters(settings: dict[str, Any]) -> int:
    return count_parameters(build_on_meta(load_config(flags(settings)), VOCABULARY))


class Experts:
    """Validation loss with a mixture of experts, and with a dense layer with the same number of active parameters."""

    sizes = CLAIMS["experts"].sizes
    figures = ("val_loss",)
    across, lines, panel = "mixer", "feed_forward", None

    def units(self) -> list[Unit]:
        return [
            {"mixer": mixer, "feed_forward": name, "seed": seed}
            for seed in self.sizes["seeds"]
            for mixer in self.sizes["mixers"]
            for name in self.sizes["feed_forwards"]
        ]

    def measure(self, unit: Unit) -> dict[str, Any]:
        last = train(
            folder_of("experts", unit),
            self.sizes["settings"],
            self.sizes["feed_forwards"][unit["feed_forward"]],
            {"model.mixer": unit["mixer"], "model.layer_pattern": "L", "training.seed": unit["seed"]},
            {"validation.interval": self.sizes["settings"]["training.steps"]},
        )
        return {"val_loss": last["val_loss"], "last": last}

    def verdict(self, rows: list[dict[str, Any]]) -> tuple[str, str]:
        checks, words = [], []
        for mixer in self.sizes["mixers"]:
            (mixture, error), (dense, dense_error) = (
                mean_and_error([row["val_loss"] for row in of(rows, mixer=mixer, feed_forward=name)])
                for name in ("mixture", "dense")
            )
            checks.append((dense - mixture, (error**2 + dense_error**2) ** 0.5, 0.0))
            words.append(f"{mixer}: mixture {mixture:.4f} ± {error:.2g}, dense {dense:.4f} ± {dense_error:.2g}")
        return verdict(checks), "; ".join(words)
