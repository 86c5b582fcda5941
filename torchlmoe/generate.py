"""Continues text with a trained model: python -m torchlmoe.generate --checkpoint DIR --prompt "..." [--prompt ...]

Prompts are continued together. Each is written to standard output with its continuation, one after another with a line
of three hyphens between, as the tokens come; or, with --json, as one JSON object per line.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from torchlmoe.command import FlagParser, run
from torchlmoe.files import is_unicode

if TYPE_CHECKING:
    from torchlmoe.inference.text_stream import Row

MAX_PROMPT_BYTES = 2**30


def main(arguments: list[str]) -> None:
    flags = _parser().parse_args(arguments)
    prompts = [*map(_utf8, flags.prompt), *map(_read, flags.prompt_file)]
    if bad := [stop for stop in flags.stop if not is_unicode(stop)]:
        raise ValueError(f"--stop {bad[0]!a} is not UTF-8 text.")
    if "" in flags.stop:
        raise ValueError("A stop string is empty; give at least one character.")
    if not all(prompts):
        raise ValueError("A prompt is empty; give it at least one character.")
    if not prompts:
        raise ValueError("There is no prompt; give --prompt TEXT or --prompt-file FILE, once or more.")
    # Imported here, so that --help and a mistyped flag answer at once.
    import torch

    from torchlmoe.checkpoint import open_model
    from torchlmoe.checkpoint.conventions import conventions_of
    from torchlmoe.inference.sampling import Sampling
    from torchlmoe.inference.text_stream import Row, continue_rows, stream_in_order
    from torchlmoe.parallel.mesh import choose_device

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.repetition_penalty)
    dtype = None if flags.dtype is None else getattr(torch, flags.dtype)
    model, config, tokenizer = open_model(flags.checkpoint, dtype=dtype, device=choose_device(flags.device))
    # As in training, where documents begin with the end token; a model of transformers may have seen nothing there.
    conventions = conventions_of(flags.checkpoint, config, tokenizer)
    prompt_ids = [
        [*conventions.before_context, *ids] or [conventions.before_text] for ids in tokenizer.encode_batch(prompts)
    ]
    rows = [Row(tokenizer, ids, flags.stop) for ids in prompt_ids]
    steps = continue_rows(
        model,
        rows,
        prompt_ids,
        max_new_tokens=flags.max_new_tokens,
        end_id=tokenizer.end_id,
        vocab_size=tokenizer.vocab_size,
        sampling=sampling,
        seed=flags.seed,
        compile=flags.compile,
    )
    if flags.json:
        _print_json(prompts, rows, steps)
    else:
        _print_text(stream_in_order(rows, steps))


def _print_text(pieces: Iterable[tuple[int, str]]) -> None:
    shown = 0
    for row, text in pieces:
        if row != shown:
            print("\n---")
            shown = row
        print(text, end="", flush=True)
    print()


def _print_json(prompts: list[str], rows: "list[Row]", steps: Iterable[object]) -> None:
    """One line per prompt, in their order, each as soon as it and those before it have ended."""
    printed = 0
    for _ in steps:
        while printed < len(rows) and rows[printed].finish_reason:
            row = rows[printed]
            completion = {
                "prompt": prompts[printed],
                "text": row.text,
                "num_tokens": row.num_tokens,
                "finish_reason": row.finish_reason,
            }
            print(json.dumps(completion, ensure_ascii=False), flush=True)
            printed += 1


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(prog="python -m torchlmoe.generate", description=__doc__.splitlines()[0].partition(":")[0])
    add = parser.add_argument
    parser.add_path(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="a run's folder, one of its checkpoints, an exported model, or a folder of transformers",
    )
    add("--prompt", metavar="TEXT", action="append", default=[], help="text to continue; may be repeated")
    parser.add_path(
        "--prompt-file",
        metavar="FILE",
        action="append",
        default=[],
        help="the same from a file, - is standard input",
    )
    add(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=128,
        help="tokens to add, or fewer to the document's end; default %(default)s",
    )
    add(
        "--temperature",
        metavar="T",
        type=float,
        default=1.0,
        help="divides the logits, 0 takes the likeliest token; default %(default)s",
    )
    add("--top-k", metavar="K", type=int, help="draw from the K likeliest tokens; all if unset")
    add(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw from the likeliest that together reach P; default %(default)s",
    )
    add(
        "--repetition-penalty",
        metavar="R",
        type=float,
        default=1.0,
        help="above 1, what was there is less likely; default %(default)s",
    )
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end a continuation before this text; may be repeated",
    )
    add("--json", action="store_true", help="print one JSON object per prompt: prompt, text, num_tokens, finish_reason")
    add("--compile", action="store_true", help="compile the step: slow to start, pays off over many tokens")
    add("--seed", metavar="N", type=int, default=0, help="of the draws; default %(default)s")
    add("--dtype", choices=["float32", "bfloat16", "float64"], help="of the weights; as saved if unset")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run; default auto")
    return parser


def _utf8(prompt: str) -> str:
    """The prompt, if the bytes that the shell gave are text."""
    if not is_unicode(prompt):
        raise ValueError(f"--prompt {prompt!a} is not UTF-8 text.")
    return prompt


def _read(path: Path) -> str:
    """The text of a file or pipe, or of standard input for "-", without the last line's end."""
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            content = file.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise ValueError(f"it has more than {MAX_PROMPT_BYTES:,} bytes")
        return content.decode().removesuffix("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompt-file {path} cannot be read as UTF-8 text: {error}.") from None


if __name__ == "__main__":
    run(main)
