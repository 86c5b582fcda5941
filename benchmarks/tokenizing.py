"""Time to tokenize synthetic text by one process and by several: python -m benchmarks.tokenizing

The text consists of words drawn by Zipf's law from an artificial vocabulary, so that the tokenizer merges tokens of all
lengths. Each number of processes makes a separate store from the same files, and the identities of the stores are
compared.

The table also has the CPU seconds of the main process and of the processes that it starts. The main process works
serially: if one process takes A seconds, and with n others the main one takes s and the others w in total, the speedup
is at most A / (s + w / n), on an idle machine too. A piece of the corpus is 16 MB; a few pieces do not divide evenly.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.report import arguments, show
from torchlmoe.data.prepare import Effort, prepare
from torchlmoe.data.tokenizer import load_tokenizer

WORDS_AT_ONCE = 200_000


def write_text(folder: Path, num_bytes: int) -> None:
    """Write a .jsonl file of about num_bytes, with documents of 20 to 2,000 words."""
    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(generator.choice(letters, generator.integers(1, 12))) for _ in range(50_000)])
    with (folder / "text.jsonl").open("w") as file:
        while file.tell() < num_bytes:
            drawn = words[np.minimum(generator.zipf(1.2, WORDS_AT_ONCE), len(words)) - 1]
            for part in np.split(drawn, np.cumsum(generator.integers(20, 2000, 200))):
                if len(part):
                    file.write(json.dumps({"text": " ".join(part)}) + "\n")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="text to tokenize")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text").mkdir()
        write_text(folder / "text", options.megabytes * 10**6)
        tokenizer, contents = load_tokenizer("embedded"), set()
        for workers in options.workers:
            begin, used = time.perf_counter(), os.times()
            store = prepare(
                str(folder / "text"),
                "train",
                tokenizer=tokenizer,
                cache_dir=folder / str(workers),
                validation_fraction=0,
                effort=Effort(workers),
            )
            seconds = time.perf_counter() - begin
            own, others = (
                sum(getattr(os.times(), name) - getattr(used, name) for name in names)
                for names in (("user", "system"), ("children_user", "children_system"))
            )
            contents.add(store.index.content)
            rows.append(
                {
                    "processes": workers,
                    "seconds": round(seconds, 1),
                    "MB/s": round(store.text_bytes / 1e6 / seconds, 2),
                    "speedup": round(rows[0]["seconds"] / seconds, 2) if rows else 1.0,
                    "CPU s, caller": round(own, 2),
                    "CPU s, others": round(others, 2),
                    "bound of speedup": round(rows[0]["CPU s, caller"] / (own + others / workers), 2) if rows else 1.0,
                    "tokens": store.num_tokens,
                }
            )
    assert len(contents) == 1, "the stores differ"
    show(f"Tokenizing {options.megabytes:,} MB of synthetic text", rows, options.output)


if __name__ == "__main__":
    main()
