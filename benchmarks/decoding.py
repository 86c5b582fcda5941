"""Time and memory of a decoding step by position, linear models beside softmax: python -m benchmarks.decoding

Models have the sizes of the debug recipe: one of the mixers in all blocks, the LLLN hybrid, softmax attention in all
blocks. The cost of a position does not depend on the values in the cache, so the cache is filled with random numbers.
Positions are timed in turn, step by step, and ratios are those of medians. Memory is that of the cache plus the peak of
other tensors that a step makes. A second table compares the compiled step of the debug model with the eager one: the
step only, and a generation with its prompt, steps and sampling.
"""

import math
import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.peak_bytes import PeakBytes
from benchmarks.report import arguments, interleaved_seconds, show
from torchlmoe.config.load import load_config
from torchlmoe.inference.cache import LENGTH, new_cache
from torchlmoe.inference.compiled import compile_step
from torchlmoe.inference.generate import generate
from torchlmoe.mixers import MIXERS
from torchlmoe.model.decoder import Decoder, build_on_meta

CONFIG = "train_configs/debug.toml"
VOCABULARY = 4096
POSITIONS = [1024, 8192, 32768, 131072]
PROMPT, GENERATED = 32, 128  # tokens of a row


def build(device: str, *settings: str) -> Decoder:
    config = load_config(["--job.config_file", CONFIG, *settings])
    model = build_on_meta(config, VOCABULARY).to_empty(device=device)
    model.init_weights(0)
    return model.eval()


class Step:
    """Decodes one token of each of `rows` rows at a position, again and again."""

    def __init__(self, model: Decoder, position: int, rows: int, max_length: int | None = None):
        self.model, self.next_logits = model, model.next_logits
        self.cache = new_cache(model, rows, max_length or position + 1)
        generator = torch.Generator(self.cache.device or "cpu").manual_seed(0)
        for tensor in self.cache.values(True, True):
            if tensor.is_floating_point():
                tensor.normal_(std=0.1, generator=generator)
        self.cache[LENGTH].fill_(position)
        self.tokens = torch.full((rows, 1), 5, device=self.cache[LENGTH].device)

    def __call__(self) -> None:
        self.next_logits(self.tokens, self.cache[LENGTH][:, None], self.cache)

    def bytes(self) -> int:
        """Return the bytes of the cache plus the peak of other tensors that a step makes."""
        tensors = list(self.cache.values(True, True))
        with PeakBytes(given=[*tensors, self.tokens, *self.model.parameters(), *self.model.buffers()]) as peak:
            self()
        return sum(tensor.nbytes for tensor in tensors) + peak.most


def by_position(name: str, model: Decoder, positions: list[int], rows: int, repeats: int) -> list[dict[str, Any]]:
    steps = {position: Step(model, position, rows) for position in positions}
    seconds = interleaved_seconds({str(position): step for position, step in steps.items()}, repeats=repeats)
    table, first = [], None
    for position, step in steps.items():
        row = {"time": statistics.median(seconds[str(position)]), "bytes": step.bytes()}
        first = first or row
        table.append(
            {
                "mixers": name,
                "position": position,
                "ms": 1e3 * row["time"],
                "MiB": row["bytes"] / 2**20,
                "time over first": row["time"] / first["time"],
                "memory over first": row["bytes"] / first["bytes"],
            }
        )
    return table


def compiled_beside_eager(model: Decoder, rows: int, repeats: int) -> list[dict[str, Any]]:
    eager, compiled = (Step(model, 256, rows, max_length=640) for _ in range(2))
    compiled.next_logits = compile_step(model.next_logits)
    generations = {
        f"{name} generation": partial(generate, model, [[5] * PROMPT] * rows, max_new_tokens=GENERATED, compile=flag)
        for name, flag in (("eager", False), ("compiled", True))
    }
    table: list[dict[str, Any]] = []
    # Timed separately, since a generation takes much longer than a step.
    for cases, count, tokens in (
        ({"eager step": eager, "compiled step": compiled}, repeats, 1),
        (generations, max(3, repeats // 5), GENERATED),
    ):
        seconds = interleaved_seconds(cases, repeats=count, warmups=3)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        baseline = medians[next(iter(cases))]
        table += [
            {"what": name, "rows": rows, "ms per token": 1e3 * median / tokens, "times as fast": baseline / median}
            for name, median in medians.items()
        ]
    return table


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="*", choices=MIXERS, default=["gated_deltanet", "mamba2", "gla", "rwkv7"])
    parser.add_argument("--positions", type=int, nargs="+", default=POSITIONS, help="positions of the decoded token")
    parser.add_argument("--rows", type=int, default=1, help="rows that decode together")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed at each position")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled step, which takes minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    cases = {mixer: ["--model.layer_pattern", "L", "--model.mixer", mixer] for mixer in options.mixers}
    cases |= {"gated_deltanet LLLN": [], "attention": ["--model.layer_pattern", "N"]}
    rows: list[dict[str, Any]] = []
    for name, settings in cases.items():
        rows += by_position(name, build(options.device, *settings), options.positions, options.rows, options.repeats)
    beside = []
    if not options.no_compile:
        beside = compiled_beside_eager(build(options.device), options.rows, options.repeats)
        show("Debug model, compiled beside eager", beside, None)
    largest = {row["mixers"]: row for row in rows if row["position"] == max(options.positions)}
    pure = [row for name, row in largest.items() if name in options.mixers]
    worst = {
        column: max((row[column] for row in pure), default=math.nan)
        for column in ("time over first", "memory over first")
    }
    show(
        "One step by position",
        rows,
        options.output,
        config=CONFIG,
        decoded_rows=options.rows,
        worst=worst,
        compiled=beside,
    )


if __name__ == "__main__":
    main()
