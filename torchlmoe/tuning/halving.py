"""Successive halving (arXiv 1502.07943): short runs of all trials, then longer runs of the best of them, and so on.

Every run starts from scratch and has the whole schedule of its length, including warm-up and decay, so a round compares
the losses of complete runs. If runs were continued at a longer length, they would be compared before their decay, which
favors low learning rates, or would decay twice. Starting from scratch costs little, since early rounds are short. The
last round has at least two runs, since the best learning rate of a short run may be too high for a long one.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

from torchlmoe.tuning.trials import Values, at_edge


@dataclass(frozen=True)
class Plan:
    """The plan of a search.

    settings: of the recipe, resolved. tried: values of each trial. lengths: steps of a run in each round.
    keep: one in `keep` trials reaches the next round.
    """

    settings: dict[str, Any]
    tried: list[Values]
    lengths: list[int]
    keep: int


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run.

    trial, round: numbers from 0. values: of the tuned settings. val_loss: the last validation loss, or None with an
    `error`. seconds: since the run was last started.
    """

    trial: int
    round: int
    steps: int
    values: Values
    val_loss: float | None
    error: str | None
    seconds: float


def lengths_of(steps: int, rounds: int, keep: int) -> list[int]:
    """Returns the steps of a run in each round: `steps` in the last, and 1 / keep of the next in each other."""
    return [math.ceil(steps / keep ** (rounds - 1 - round_)) for round_ in range(rounds)]


def search(
    plan: Plan,
    done: list[Outcome],
    run: Callable[[int, int, Values, int], Outcome],
    write: Callable[[list[Outcome]], object],
    *,
    processes: int,
    say: Callable[[str], None],
) -> Outcome:
    """Does the runs that are not among `done`, and returns the best run of the last round.

    done: outcomes of an interrupted search. run: (trial, round, values, steps) -> its outcome; called in `processes`
    threads. write: called with all outcomes after each run. say: called with lines for the console.
    Raises ValueError if all runs of a round failed.
    """
    outcomes, remaining = list(done), list(range(len(plan.tried)))
    for round_, steps in enumerate(plan.lengths):
        say(f"round {round_ + 1} of {len(plan.lengths)}: {len(remaining)} runs of {steps} steps")
        finished = {outcome.trial for outcome in outcomes if outcome.round == round_}
        executor = ThreadPoolExecutor(processes)
        try:
            futures = [
                executor.submit(run, trial, round_, plan.tried[trial], steps)
                for trial in remaining
                if trial not in finished
            ]
            for future in as_completed(futures):
                outcomes.append(future.result())
                write(outcomes)
                say(_line(outcomes[-1]))
        finally:
            executor.shutdown(wait=False, cancel_futures=True)  # the caller ends the remaining runs
        of_round = [outcome for outcome in outcomes if outcome.round == round_]
        good = sorted(
            (each for each in of_round if each.val_loss is not None), key=lambda each: (each.val_loss, each.trial)
        )
        if not good:
            raise ValueError(
                f"All runs of round {round_ + 1} failed. The first error: {of_round[0].error} Try other "
                "values, or keep more of them (--keep 2)."
            )
        remaining = [outcome.trial for outcome in good[: max(2, math.ceil(len(remaining) / plan.keep))]]
    return good[0]


def as_json(plan: Plan, outcomes: list[Outcome], best: Outcome | None) -> dict[str, Any]:
    """Returns the search as JSON: plan, runs, their cost in steps, that of a full sweep, and `best` if it is known."""
    record: dict[str, Any] = {
        "plan": asdict(plan),
        "runs": [asdict(outcome) for outcome in sorted(outcomes, key=lambda each: (each.round, each.trial))],
        "steps": sum(outcome.steps for outcome in outcomes),
        "steps_of_full_sweep": plan.lengths[-1] * len(plan.tried),
    }
    if best is not None:
        record["best"] = {
            "values": best.values,
            "val_loss": best.val_loss,
            "at_edge": at_edge(plan.tried, best.values),
        }
    return record


def _line(outcome: Outcome) -> str:
    values = ", ".join(f"{name} {value}" for name, value in outcome.values.items())
    result = f"val_loss {outcome.val_loss:.4f}" if outcome.val_loss is not None else f"failed: {outcome.error}"
    return f"  {values}: {result}, {outcome.seconds:.0f} s"
