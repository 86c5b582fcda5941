"""The claims about time and memory: training throughput, and decoding."""

import statistics
import time
from typing import Any

import torch

from benchmarks.claims.record import Unit, in_a_process, of, paired_ratio_and_error, ratio_and_error
from benchmarks.claims.table import CLAIMS, verdict
from benchmarks.report import seconds_of
from benchmarks.training import steps_of
from torchlmoe.config.load import load_config
from torchlmoe.config.settings import Config
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.parallel.mesh import choose_device
from torchlmoe.training.host_memory import keep_freed_pages
from torchlmoe.training.metrics import memory_gib


def _config(sizes: dict[str, Any], mixer: str) -> Config:
    flags = [f"--{name}={value}" for name, value in sizes["settings"].items()]
    return load_config([*flags, "--model.layer_pattern=L", f"--model.mixer={mixer}"])


class Throughput:
    """Tokens/s and peak memory of a training step. Each mixer and length has a separate process."""

    sizes = CLAIMS["throughput"].sizes
    figures = ("tokens_per_second", "memory_gib")
    across, lines, panel = "length", "mixer", None

    def units(self) -> list[Unit]:
        return [
            {"mixer": mixer, "length": length, "rows": rows}
            for length, rows in self.sizes["rows"]
            for mixer in self.sizes["mixers"]
        ]

    def measure(self, unit: Unit) -> dict[str, Any]:
        return in_a_process(_train, unit)

    def verdict(self, rows: list[dict[str, Any]]) -> tuple[str, str]:
        (shortest, _), (longest, _) = self.sizes["rows"][0], self.sizes["rows"][-1]
        ratios = {
            mixer: ratio_and_error(
                *(of(rows, mixer=mixer, length=length)[0]["all_tokens_per_second"] for length in (longest, shortest))
            )
            for mixer in self.sizes["mixers"]
        }
        softmax, softmax_error = ratios["attention"]
        linear = [ratios[mixer] for mixer in self.sizes["mixers"] if mixer != "attention"]
        checks = [(ratio, error, self.sizes["least_ratio"]) for ratio, error in linear]
        checks += [(ratio - softmax, (error**2 + softmax_error**2) ** 0.5, 0.0) for ratio, error in linear]
        return verdict(checks), _listed(f"tokens/s at {longest} over {shortest}", ratios)


def _train(unit: Unit) -> dict[str, Any]:
    keep_freed_pages()
    torch.manual_seed(0)
    sizes = CLAIMS["throughput"].sizes
    device = choose_device("auto")
    step = steps_of(_config(sizes, unit["mixer"]), sizes["settings"]["model.vocab_size"])(unit["rows"], unit["length"])
    seconds = [seconds_of(step, device.type) for _ in range(sizes["repeats"] + 2)][2:]
    speeds = [unit["rows"] * unit["length"] / each for each in seconds]
    return {
        "tokens_per_second": statistics.median(speeds),
        "all_tokens_per_second": speeds,
        "memory_gib": memory_gib(device),
    }


class Decoding:
    """Seconds of a decoded token and bytes of the cache, by position in one row. Positions are timed in turn."""

    sizes = CLAIMS["decoding"].sizes
    figures = ("milliseconds", "cache_mib")
    across, lines, panel = "position", "mixer", None

    def units(self) -> list[Unit]:
        return [{"mixer": mixer} for mixer in self.sizes["mixers"]]

    def measure(self, unit: Unit) -> dict[str, Any]:
        return in_a_process(_decode, unit)

    def verdict(self, rows: list[dict[str, Any]]) -> tuple[str, str]:
        checks, ratios = [], {}
        for row in rows:
            first, last = row["points"][0], row["points"][-1]
            mixer = row["unit"]["mixer"]
            ratio, error = paired_ratio_and_error(last["all_milliseconds"], first["all_milliseconds"])
            ratios[mixer] = ratio, error
            if mixer == "attention":
                checks.append((ratio, error, self.sizes["least_softmax_ratio"]))
            else:
                checks.append((-ratio, error, -self.sizes["most_ratio"]))
                checks.append((-last["cache_mib"], 0.0, -first["cache_mib"]))
        positions = self.sizes["positions"]
        return verdict(checks), _listed(f"time at {positions[-1]} over {positions[0]}", ratios)


@torch.inference_mode()
def _decode(unit: Unit) -> dict[str, Any]:
    sizes = CLAIMS["decoding"].sizes
    device = choose_device("auto")
    vocab_size = sizes["settings"]["model.vocab_size"]
    model = build_on_meta(_config(sizes, unit["mixer"]), vocab_size)
    model.to_empty(device=device)
    model.init_weights(0)
    model.eval()
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=device)
    # The values in a cache do not change the time of a step, so no prompt is read.
    caches = {position: model.init_cache(1, position + 1) for position in sizes["positions"]}
    seconds: dict[int, list[float]] = {position: [] for position in caches}
    for repeat in range(sizes["repeats"] + 3):
        for position, cache in caches.items():
            at = torch.full_like(tokens, position)
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            model.next_logits(tokens, at, cache)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:
                seconds[position].append(time.perf_counter() - begin)
    points = []
    for position, cache in caches.items():
        leaves = cache.values(include_nested=True, leaves_only=True)
        milliseconds = [1e3 * each for each in seconds[position]]
        points.append(
            {
                "position": position,
                "milliseconds": statistics.median(milliseconds),
                "all_milliseconds": milliseconds,
                "cache_mib": sum(leaf.numel() * leaf.element_size() for leaf in leaves) / 2**20,
            }
        )
    return {"points": points}


def _listed(what: str, ratios: dict[str, tuple[float, float]]) -> str:
    return f"{what}: " + ", ".join(f"{name} {ratio:.3g} ± {error:.2g}" for name, (ratio, error) in ratios.items())
