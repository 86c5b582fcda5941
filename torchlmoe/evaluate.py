"""Evaluates a trained model: python -m torchlmoe.evaluate --checkpoint DIR (--tasks a,b | --text FILE | --recall mqar)

--tasks runs tasks of lm-eval, --text measures bits per byte and perplexity of files, --recall runs tasks of recall and
state tracking. Results are printed as tables. --output writes them as JSON too: `results` and the other entries of
lm-eval, `text` by file, and `recall` by task.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from torchlmoe.command import FlagParser, open_flagged_model, run
from torchlmoe.files import failures_to_write


def main(arguments: list[str]) -> None:
    flags = _parser().parse_args(arguments)
    _check(flags)
    # Imported here, so that --help and mistyped flags get a fast answer.
    from torchlmoe.checkpoint.conventions import conventions_of

    model, config, tokenizer = open_flagged_model(flags)
    conventions = conventions_of(flags.checkpoint, config, tokenizer, flags.begin_with_end)
    results: dict[str, Any] = {}
    refused: list[str] = []
    if flags.recall:  # first, since it takes the least time, and its options may raise an error
        from torchlmoe.evaluation.recall import NUM_DOCUMENTS, evaluate_recall, trained_options

        recall = evaluate_recall(
            model,
            flags.recall,
            options=trained_options(config.data),
            by=flags.recall_by,
            num_documents=NUM_DOCUMENTS if flags.limit is None else int(flags.limit),
            batch_size=flags.batch_size,
            seed=flags.seed,
            end_id=tokenizer.end_id,
        )
        _print_recall(recall)
    if flags.tasks:
        from lm_eval.utils import make_table

        from torchlmoe.evaluation.harness import HarnessModel, evaluate_tasks

        harness_model = HarnessModel(
            model,
            tokenizer,
            conventions=replace(conventions, max_length=flags.max_length or conventions.max_length),
            rows_at_once=flags.batch_size,
            seed=flags.seed,
        )
        results |= evaluate_tasks(
            harness_model,
            flags.tasks,
            include_paths=list(map(str, flags.include_path)),
            num_fewshot=flags.num_fewshot,
            limit=flags.limit,
        )
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
    if flags.text:
        from torchlmoe.evaluation.texts import evaluate_texts

        results["text"], refused = evaluate_texts(
            model,
            tokenizer,
            flags.text,
            max_length=flags.max_length,
            trained_length=config.training.seq_len,
            begin_id=conventions.before_text,
        )
        _print_texts(results["text"])
    if flags.recall:
        results["recall"] = recall
    if flags.output is not None:
        with failures_to_write("The results", flags.output, "make room, or give another --output"):
            flags.output.write_text(json.dumps(results, indent=2, ensure_ascii=False, default=_plain) + "\n")
    if refused:
        others = f" ({len(refused) - 1} more files have no figure either)" * (len(refused) > 1)
        raise ValueError(refused[0] + others)


def _check(flags: argparse.Namespace) -> None:
    if not flags.tasks and not flags.text and not flags.recall:
        raise ValueError("There is nothing to evaluate; give --tasks NAME,NAME, --text FILE or --recall NAME,NAME.")
    if flags.recall:
        from torchlmoe.evaluation.recall import check_names

        check_names(flags.recall)
    if flags.include_path and not flags.tasks:
        raise ValueError("--include-path has no effect without --tasks; give --tasks too.")
    for path in flags.include_path:
        if not path.is_dir():
            raise ValueError(f"--include-path {path} is not a folder; give one with YAML files of tasks.")
    for name in ("batch_size", "max_length"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if flags.num_fewshot is not None and flags.num_fewshot < 0:
        raise ValueError(f"--num-fewshot {flags.num_fewshot} must be at least 0.")
    if flags.limit is not None and not flags.limit > 0:
        raise ValueError(f"--limit {flags.limit} must be above 0: a number of documents, or a share below 1.")
    if flags.limit is not None and flags.recall and not flags.limit.is_integer():
        raise ValueError(f"--limit {flags.limit} must be a whole number of documents with --recall.")
    if flags.output is not None and not flags.output.parent.is_dir():
        raise ValueError(f"--output {flags.output} is in a folder that is missing; make it first.")
    if flags.output is not None and not os.access(flags.output.parent, os.W_OK):
        raise ValueError(f"--output {flags.output} is in a folder that cannot be written to; name another file.")
    if not 0 <= flags.seed < 2**63:
        raise ValueError(f"--seed {flags.seed} must be at least 0 and less than 2^63.")
    if flags.output is not None and flags.output.is_dir():
        raise ValueError(f"--output {flags.output} is a folder; give the name of a file.")
    if flags.tasks and find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-eval, which is not installed: pip install 'torchlmoe[eval]'.")


def _print_texts(texts: dict[str, dict[str, Any]]) -> None:
    width = max(map(len, texts))
    print(f"{'file':{width}}  {'bits/byte':>10}  {'perplexity':>11}  {'bytes':>12}  {'tokens':>12}")
    for name, row in texts.items():
        if "error" in row:
            print(f"{name:{width}}  {row['error']}")
        else:
            figures = f"{row['bits_per_byte']:10.4f}  {row['perplexity']:11.4f}"
            print(f"{name:{width}}  {figures}  {row['num_bytes']:12,}  {row['num_tokens']:12,}")
    sys.stdout.flush()


def _print_recall(recall: dict[str, dict[str, Any]]) -> None:
    rows = [
        (name, _listed(point["options"]), result["by"], point)
        for name, result in recall.items()
        for point in result["points"]
    ]
    name_width, width = (max(len(row[place]) for row in rows) for place in (0, 1))
    print(
        f"{'recall':{name_width}}  {'':{width}}  {'by':10}  {'tokens right':15}  {'answers right':15}  {'answers':>9}"
    )
    for name, options, by, point in rows:
        shares = "  ".join(
            f"{_with_error(point[key], point[f'{key}_se']):15}" for key in ("token_accuracy", "exact_match")
        )
        print(f"{name:{name_width}}  {options:{width}}  {by:10}  {shares}  {point['num_questions']:9,}")
    for name, result in recall.items():
        for omitted in result["left_out"]:
            print(f"{name}: left out {_listed(omitted['options'])}: {omitted['reason']}")
    sys.stdout.flush()


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _plain(value: object) -> object:
    """Convert a value that JSON cannot represent to the form that lm-eval writes."""
    from lm_eval.utils import handle_non_serializable

    return handle_non_serializable(value)


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(prog="python -m torchlmoe.evaluate", description=__doc__.splitlines()[0].partition(":")[0])
    add = parser.add_argument
    parser.add_model()
    add("--tasks", metavar="NAME,NAME", type=_names, default=[], help="tasks or groups of lm-eval")
    parser.add_path(
        "--include-path",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder with YAML files of more tasks; may be repeated",
    )
    parser.add_path("--text", metavar="FILE", nargs="+", action="extend", default=[], help="files to measure")
    add(
        "--recall",
        metavar="NAME,NAME",
        type=_names,
        default=[],
        help="tasks of recall and state tracking: mqar, s5, ...",
    )
    add(
        "--recall-by",
        choices=["likelihood", "generation"],
        default="likelihood",
        help="the likeliest token at each answer, or a greedy continuation of each document's last question",
    )
    parser.add_path("--output", metavar="FILE.json", help="where to write the results")
    add("--num-fewshot", metavar="N", type=int, help="examples before each question; the task's own number if unset")
    add(
        "--limit",
        metavar="N",
        type=float,
        help="documents of each task, or their share below 1; all if unset, of a recall task 128 of each size",
    )
    add(
        "--max-length",
        metavar="N",
        type=int,
        help="tokens that the model sees at most; training.seq_len if unset (of a model of transformers, in tasks, "
        "max_position_embeddings), but a text as a whole if no block's memory grows with it",
    )
    add(
        "--begin-with-end",
        action=argparse.BooleanOptionalAction,
        help="begin every context of a task with the end token; as the model was trained if unset",
    )
    add("--batch-size", metavar="N", type=int, default=16, help="rows that generate together; default %(default)s")
    add("--seed", metavar="N", type=int, default=0, help="seed of sampled tokens and documents; default %(default)s")
    return parser


if __name__ == "__main__":
    run(main)
