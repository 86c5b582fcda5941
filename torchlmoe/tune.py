"""Tunes settings of a recipe: python -m torchlmoe.tune --job.config_file X --tune.optimizer.lr a,b,c --output FILE.json

Successive halving: short runs of all values, longer runs of the best of them, then runs of the recipe's length of the
best of those. Other settings are those of train.py. After --tune.SETTING, a,b,c is a list; lo:hi or lo:hi:log is a
range to draw from; x16 is the recipe's own value times powers of two from 1/16 to 16. If it is killed, the same command
resumes. Writes FILE.json with every run, FILE.png, and FILE.toml with the best settings.
"""

import argparse
import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from torchlmoe.command import FlagParser, run
from torchlmoe.config.load import load_config, to_dict, to_toml
from torchlmoe.config.settings import Config
from torchlmoe.files import failures_to_write, replacing
from torchlmoe.mixers import MIXERS
from torchlmoe.tuning.halving import Outcome, Plan, as_json, lengths_of, search
from torchlmoe.tuning.trials import Range, choices, trials

PREFIX = "--tune."
# Settings that a search sets itself.
OWN = ("training.steps", "lr_scheduler.warmup_steps", "job.dump_folder", "validation.interval", "validation.enable")


def main(arguments: list[str]) -> None:
    tuned, rest = _tuned(arguments)
    flags, settings = _parser().parse_known_args(rest)
    for name, least in (("processes", 1), ("trials", 2), ("rounds", 1), ("keep", 2)):
        if getattr(flags, name) < least:
            raise ValueError(f"--{name} {getattr(flags, name)} must be at least {least}.")
    if flags.output.suffix != ".json":
        raise ValueError(
            f"--output {flags.output} must end in .json; the picture and the settings are written beside it."
        )
    config = load_config(settings)
    plan = _plan(flags, settings, config, tuned)
    _check_files(flags.output)
    with failures_to_write("The search", flags.output, "make room, or name another file"):
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(flags.output)
    with lock:
        _search(flags, settings, config, plan)


def _locked(output: Path) -> AbstractContextManager:
    """A lock on a search's files. Raises ValueError if another search has it."""
    try:
        return FileLock(f"{output}.lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"Another search writes {output}: wait until it ends, or name another file.") from None


def _search(flags: argparse.Namespace, settings: list[str], config: Config, plan: Plan) -> None:
    # Imported here, so that --help and mistyped settings get a fast answer.
    from torchlmoe.tuning.picture import draw
    from torchlmoe.tuning.runs import Runs

    output: Path = flags.output
    done = _done(output, plan)
    digest = hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode()).hexdigest()[:12]
    folder = output.with_suffix(".runs") / digest
    runs = Runs(settings, config, folder, processes=flags.processes, steps=plan.lengths[-1])

    def write(outcomes: list[Outcome], best: Outcome | None = None) -> dict[str, Any]:
        record = as_json(plan, outcomes, best)
        with replacing(output, "The search", "make room; the same command resumes it") as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")
        done[:] = outcomes
        return record

    try:
        best = search(plan, done, runs, write, processes=flags.processes, say=lambda line: print(line, flush=True))
    finally:
        runs.stop()
    record = write(list(done), best)
    draw(record, output.with_suffix(".png"))
    best_config = load_config([*settings, *(f"--{name}={value}" for name, value in best.values.items())])
    output.with_suffix(".toml").write_text(to_toml(best_config))
    print(
        f"best: {', '.join(f'{name} = {value}' for name, value in best.values.items())}, val_loss {best.val_loss:.4f}"
    )
    print(f"cost: {record['steps']:,} steps, of {record['steps_of_full_sweep']:,} for all values at full length")
    for name in record["best"]["at_edge"]:
        print(f"{name} = {best.values[name]} is the smallest or largest value tried: widen the search.")
    print(f"written: {output}, {output.with_suffix('.png').name}, {output.with_suffix('.toml').name}")


def _plan(flags: argparse.Namespace, settings: list[str], config: Config, tuned: dict[str, str]) -> Plan:
    if not tuned:
        raise ValueError("There is nothing to tune; give --tune.optimizer.lr 1e-3,2e-3,4e-3 or the like, once or more.")
    if not config.validation.enable:
        raise ValueError("validation.enable = false leaves nothing to compare runs by; set it to true.")
    choices_of: dict[str, list[str] | Range] = {}
    for name, text in tuned.items():
        if name in OWN:
            raise ValueError(f"--tune.{name} cannot be tuned: the search sets {name}; give --{name} for the recipe.")
        choices_of[name] = choices(name, text, _own(config, name))
    tried = trials(choices_of, flags.trials, flags.seed)
    if len(tried) < 2:
        raise ValueError("Each setting has one value, so there is nothing to choose from; give several.")
    for values in tried:
        load_config([*settings, *(f"--{name}={value}" for name, value in values.items())])
    resolved = to_dict(config)
    for name in ("dump_folder", "config_file", "debug", "print_config"):
        resolved["job"].pop(name, None)
    lengths = lengths_of(config.training.steps, flags.rounds, flags.keep)
    if len(set(lengths)) < len(lengths):
        raise ValueError(
            f"training.steps = {config.training.steps} is too few for --rounds {flags.rounds} with --keep "
            f"{flags.keep}; give more steps or fewer rounds."
        )
    return Plan(resolved, tried, lengths, flags.keep)


def _own(config: Config, name: str) -> Any:
    """The recipe's value of a setting; None if it has none, or if the name is mistyped, which raises an error later."""
    value: Any = config
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else getattr(value, step, None)
    if value is None and name.startswith("model.layers."):
        *_, letter, option = name.split(".")
        mixer = config.model.layers.get(letter, {}).get("mixer")
        _, value = MIXERS[mixer].settings().get(option, (None, None)) if mixer in [*MIXERS] else (None, None)
    return value


def _check_files(output: Path) -> None:
    """Raises ValueError if a file of another origin, such as the recipe, has the name of one that is written."""
    for other in (output.with_suffix(".png"), output.with_suffix(".toml")):
        if other.exists() and not output.exists():
            raise ValueError(f"{other} exists, and would be replaced; name another --output, or remove it.")


def _done(output: Path, plan: Plan) -> list[Outcome]:
    """The outcomes that an interrupted search with this plan has written. Raises ValueError for other files."""
    if not output.exists():
        return []
    try:
        record = json.loads(output.read_text())
        if record["plan"] == json.loads(json.dumps(asdict(plan))):
            return [Outcome(**each) for each in record["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{output} was not written by a search; name another --output, or remove it.") from None
    raise ValueError(
        f"{output} belongs to another search; give its settings again, name another --output, or remove it."
    )


def _tuned(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The --tune flags, setting -> text, and the other arguments."""
    tuned: dict[str, str] = {}
    rest, remaining = [], list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith(PREFIX):
            rest.append(argument)
            continue
        name, equals, text = argument.removeprefix(PREFIX).partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ValueError(f"{argument} needs values, such as 1e-3,2e-3.")
            text = remaining.pop(0)
        if name in tuned:
            raise ValueError(f"{PREFIX}{name} is given twice; give all of its values at once.")
        tuned[name] = text
    return tuned, rest


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="python -m torchlmoe.tune",
        description=(__doc__ or "").partition(":")[0],
        epilog="--tune.SETTING a,b,c tries a list, lo:hi[:log] draws from a range, x16 multiplies the recipe's "
        "value by 1/16 to 16. All other settings are those of train.py.",
    )
    add = parser.add_argument
    parser.add_path(
        "--output",
        metavar="FILE.json",
        required=True,
        help="the result of every run; FILE.png and FILE.toml are written beside it",
    )
    add("--processes", metavar="N", type=int, default=1, help="runs at the same time; default %(default)s")
    add(
        "--rounds",
        metavar="N",
        type=int,
        default=3,
        help="number of rounds, each with longer runs; default %(default)s",
    )
    add(
        "--keep",
        metavar="N",
        type=int,
        default=4,
        help="one in N trials reaches the next round, with N times as many steps; default %(default)s",
    )
    add("--trials", metavar="N", type=int, default=16, help="number of draws, if there is a range; default %(default)s")
    add("--seed", metavar="N", type=int, default=0, help="seed of the draws; default %(default)s")
    return parser


if __name__ == "__main__":
    run(main)
