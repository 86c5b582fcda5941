"""Plans a run without a GPU: python -m torchlmoe.plan --job.config_file FILE --world-size N [--table.key value ...]

Prints the memory of each rank, the messages and the time of a step, and whether the run fits. With --search it does so
for the fastest layouts.
"""

import argparse
import json
import logging
import sys
from typing import Any

from torchlmoe.command import FlagParser, run
from torchlmoe.config.load import load_config
from torchlmoe.files import failures_to_write


def main(arguments: list[str]) -> None:
    flags, settings = _parser().parse_known_args(arguments)
    for name in ("world_size", "gpus_per_node", "traces"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)} must be at least 1.")
    config = load_config(settings)
    # Imported here, so that --help and mistyped settings get a fast answer.
    from torchlmoe.planning.gpus import gpu_named
    from torchlmoe.planning.layout import make_plan
    from torchlmoe.planning.report import as_json, as_line, as_table
    from torchlmoe.planning.search import search
    from torchlmoe.training.data import load_tokenizer_of

    logging.getLogger("torchlmoe").setLevel(logging.ERROR)
    gpu = gpu_named(flags.gpu, min(flags.gpus_per_node, flags.world_size))
    vocab_size = config.model.vocab_size or load_tokenizer_of(config.data).vocab_size
    arguments_of_plan = (config, vocab_size, flags.world_size, gpu, flags.gpu, flags.gpus_per_node)
    if flags.search:
        ranked, legal = search(
            *arguments_of_plan,
            tell=lambda plan: print(as_line(plan), file=sys.stderr, flush=True),
            num_traced=flags.traces,
        )
        print(f"{len(ranked):,} of {legal:,} layouts were traced; the others have slower estimates")
        print("\n".join(as_line(plan) for plan in ranked))
        content: Any = [as_json(plan) for plan in ranked]
    else:
        plan = make_plan(*arguments_of_plan)
        print(as_table(plan))
        content = as_json(plan)
    if flags.json is not None:
        with failures_to_write("The plan", flags.json, "make room, or name another file"):
            flags.json.write_text(json.dumps(content, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(prog="python -m torchlmoe.plan", description=(__doc__ or "").partition(":")[0])
    add = parser.add_argument
    add("--world-size", metavar="N", type=int, required=True, help="number of ranks, one per GPU")
    add("--gpu", metavar="NAME", default="h100", help="a100, h100, h200, b200, mi300x, or cpu; default %(default)s")
    add("--gpus-per-node", metavar="N", type=int, default=8, help="ranks with the fast link; default %(default)s")
    add("--search", action="store_true", help="rank the layouts of N ranks by predicted time, those that fit first")
    add(
        "--traces",
        metavar="N",
        type=int,
        default=16,
        help="maximum number of layouts that --search traces; default %(default)s",
    )
    parser.add_path("--json", metavar="FILE", help="also write the plan, or with --search a list of them, as JSON")
    return parser


if __name__ == "__main__":
    run(main)
