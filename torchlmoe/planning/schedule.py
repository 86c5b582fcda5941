"""When a pipeline's ranks work and wait: its schedule's own order of actions, run with the time that each takes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed.pipelining.schedules import _Action, _ComputationType

_KINDS = {_ComputationType.FORWARD: "forward", _ComputationType.FULL_BACKWARD: "backward"}


def makespan(
    order: Mapping[int, Sequence[_Action | None]], seconds: Callable[[str, int], float], transfer: float
) -> tuple[float, float]:
    """Seconds from the first action to the last, and the mean over ranks of the part of it in which they wait.

    order: by rank, the actions of a schedule of torch.distributed.pipelining. seconds(kind, stage): of the "forward" or
    "backward" of one microbatch through a stage. transfer: seconds until the next stage has what a stage has made.
    """
    actions = {rank: [action for action in of_rank if action is not None] for rank, of_rank in order.items()}
    stage_of_last = max(action.stage_index for of_rank in actions.values() for action in of_rank)
    ended: dict[tuple[str, int, Any], float] = {}
    clock, busy, place = dict.fromkeys(actions, 0.0), dict.fromkeys(actions, 0.0), dict.fromkeys(actions, 0)
    moved = True
    while moved:
        moved = False
        for rank, of_rank in actions.items():
            while place[rank] < len(of_rank):
                action = of_rank[place[rank]]
                kind, stage, microbatch = (
                    _KINDS.get(action.computation_type),
                    action.stage_index,
                    action.microbatch_index,
                )
                if kind is not None:
                    needed = _needed(kind, stage, stage_of_last)
                    if needed is not None and (*needed, microbatch) not in ended:
                        break
                    ready = 0.0
                    if needed is not None:
                        ready = ended[(*needed, microbatch)] + (transfer if needed[1] != stage else 0.0)
                    clock[rank] = max(clock[rank], ready) + seconds(kind, stage)
                    busy[rank] += seconds(kind, stage)
                    ended[kind, stage, microbatch] = clock[rank]
                place[rank] += 1
                moved = True
    assert all(place[rank] == len(of_rank) for rank, of_rank in actions.items()), "the order waits for itself"
    end = max(clock.values())
    return end, 1 - sum(busy.values()) / len(busy) / end if end else 0.0


def _needed(kind: str, stage: int, last: int) -> tuple[str, int] | None:
    """What has to be done with the same microbatch before, if anything."""
    if kind == "forward":
        return ("forward", stage - 1) if stage else None
    return ("backward", stage + 1) if stage < last else ("forward", stage)
