"""Finds the rank that made a collective fail, from the last reports of all ranks."""

from collections.abc import Sequence
from typing import NamedTuple

# States of a rank. RUNNING may also be lost. FAILED: a collective failed here, so that another rank is the cause.
RUNNING, FAILED, ENDED = "running", "failed", "ended"

_MOST_NAMED = 8  # ranks that a sentence names


class Report(NamedTuple):
    """One report of a rank.

    beat: number of its reports so far. moves: number of operations that it has begun. where: the last of them.
    state: RUNNING, FAILED or ENDED.
    """

    beat: int
    moves: int
    where: str
    state: str


def judge(rank: int, before: Sequence[Report | None], now: Sequence[Report | None]) -> str | None:
    """Returns a clause that names the rank that made a collective fail on `rank`; None if it cannot be determined.

    before, now: reports of all ranks, some beats apart; None for a rank that has not reported.
    """
    absent = [other for other, report in enumerate(now) if report is None]
    if absent:
        return f"{_names(absent)} {_are(absent)} missing: not started, or ended before the first report"
    reports = [report for report in now if report is not None]
    running = [other for other, report in enumerate(reports) if report.state == RUNNING and other != rank]
    lost = [other for other in running if (seen := before[other]) is not None and seen.beat == reports[other].beat]
    if lost:
        return f"{_names(lost)} {_are(lost)} lost (killed, stopped or cut off), last seen in {_places(lost, reports)}"
    # Some of the ranks that are behind may wait for others. Those have failed already, since they began earlier.
    moves = min((reports[other].moves for other in running), default=0)
    last = [other for other in running if reports[other].moves == moves]
    if last and moves < reports[rank].moves:
        late = f"{_names(last)} {_are(last)} late, last seen in {_places(last, reports)}"
        return f"{late}, while rank {rank} was in {reports[rank].where}"
    if 0 < len(running) < len(reports) - len(running):
        return f"{_names(running)} {_are(running)} late or stuck, last seen in {_places(running, reports)}"
    return None


def _are(ranks: Sequence[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _names(ranks: Sequence[int]) -> str:
    names = [f"{rank}" for rank in ranks[:_MOST_NAMED]]
    if len(ranks) > _MOST_NAMED:
        names.append(f"{len(ranks) - _MOST_NAMED} more")
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _places(ranks: Sequence[int], reports: Sequence[Report]) -> str:
    """The operations of the ranks, each named once."""
    return " and ".join(dict.fromkeys(reports[rank].where for rank in ranks[:_MOST_NAMED]))
