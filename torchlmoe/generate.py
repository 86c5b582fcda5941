"""Continues text with a trained model: python -m torchlmoe.generate --checkpoint DIR --prompt "..." [--prompt ...]

All prompts are continued together. Standard output gets each prompt with its continuation, token by token, in the order
of the prompts, with a line of three hyphens between them. With --json it gets one JSON object per line.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from torchlmoe.command import FlagParser, open_flagged_model, run
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
    # Imported here, so that --help and mistyped flags get a fast answer.
    from torchlmoe.checkpoint.conventions import conventions_of
    from torchlmoe.inference.sampling import Sampling
    from torchlmoe.inference.text_stream import Row, continue_rows, stream_in_order

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.repetition_penalty)
    model, config, tokenizer = open_flagged_model(flags)
    # A prompt begins like a document in the model's training: with the end token, or as transformers' tokenizer does.
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
        end_id=conventions.end_ids,
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
    """Print one line per prompt, in order. A line is printed when its row and all earlier rows have ended."""
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
    parser.add_model()
    add("--prompt", metavar="TEXT", action="append", default=[], help="text to continue; may be repeated")
    parser.add_path(
        "--prompt-file",
        metavar="FILE",
        action="append",
        default=[],
        help="text to continue from a file, or from standard input for -; may be repeated",
    )
    add(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=128,
        help="maximum number of tokens to add; default %(default)s",
    )
    add(
        "--temperature",
        metavar="T",
        type=float,
        default=1.0,
        help="divides the logits; 0 takes the likeliest token; default %(default)s",
    )
    add("--top-k", metavar="K", type=int, help="draw from the K likeliest tokens; all if unset")
    add(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens whose probabilities add up to P; default %(default)s",
    )
    add(
        "--repetition-penalty",
        metavar="R",
        type=float,
        default=1.0,
        help="values above 1 make tokens that have occurred less likely; default %(default)s",
    )
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end a continuation before this text; may be repeated",
    )
    add("--json", action="store_true", help="print one JSON object per prompt: prompt, text, num_tokens, finish_reason")
    add("--compile", action="store_true", help="compile the step; takes minutes once, and pays off over many tokens")
    add("--seed", metavar="N", type=int, default=0, help="seed of the sampled tokens; default %(default)s")
    return parser


def _utf8(prompt: str) -> str:
    """Returns the prompt. Raises ValueError if its bytes are not UTF-8."""
    if not is_unicode(prompt):
        raise ValueError(f"--prompt {prompt!a} is not UTF-8 text.")
    return prompt


def _read(path: Path) -> str:
    """Returns the text of a file or pipe, or of standard input for "-", without a newline at its end."""
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
