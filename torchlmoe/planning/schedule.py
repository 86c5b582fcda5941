"""Simulates a pipeline schedule: when its ranks compute and when they wait, from the time of each action."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.distributed.pipelining.schedules import _Action, _ComputationType

_KINDS = {_ComputationType.FORWARD: "forward", _ComputationType.FULL_BACKWARD: "backward"}


class _Chunk(NamedTuple):
    """The "forward" or "backward" of one microbatch through a stage."""

    kind: str
    stage: int
    microbatch: int

    def needs(self, last: int) -> "_Chunk | None":
        """The chunk of the same microbatch that must end before this one. last: index of the last stage."""
        if self.kind == "forward":
            return self._replace(stage=self.stage - 1) if self.stage else None
        return self._replace(stage=self.stage + 1) if self.stage < last else self._replace(kind="forward")


def makespan(
    order: Mapping[int, Sequence[Any]], seconds: Callable[[str, int], float], transfer: float
) -> tuple[float, float]:
    """Returns the schedule's time in seconds, and the fraction of it in which ranks wait, as a mean over ranks.

    order: by rank, the actions of a schedule of torch.distributed.pipelining. seconds(kind, stage): time of the
    "forward" or "backward" of one microbatch through a stage. transfer: seconds to send a stage's output to the next.
    """
    remaining = {rank: list(_chunks(actions)) for rank, actions in order.items()}
    last = max(chunk.stage for chunks in remaining.values() for chunk in chunks)
    ended: dict[_Chunk, float] = {}
    clock, busy = dict.fromkeys(remaining, 0.0), dict.fromkeys(remaining, 0.0)
    while any(remaining.values()):
        before = len(ended)
        for rank, chunks in remaining.items():
            while chunks and ((needed := chunks[0].needs(last)) is None or needed in ended):
                chunk = chunks.pop(0)
                ready = 0.0 if needed is None else ended[needed] + transfer * (needed.stage != chunk.stage)
                clock[rank] = ended[chunk] = max(clock[rank], ready) + seconds(chunk.kind, chunk.stage)
                busy[rank] += seconds(chunk.kind, chunk.stage)
        assert len(ended) > before, "the order waits for itself"
    end = max(clock.values())
    return end, 1 - sum(busy.values()) / len(busy) / end


def _chunks(actions: Sequence[_Action | None]) -> Iterator[_Chunk]:
    """Yields a rank's computations in order.

    Microbatches are counted here, since each stage runs them in order: torch 2.13 numbers those of the last rank of a
    1F1B schedule from 1.
    """
    so_far: Counter[tuple[str, int]] = Counter()
    for action in actions:
        if action is not None and (kind := _KINDS.get(action.computation_type)) is not None:
            yield _Chunk(kind, action.stage_index, so_far[kind, action.stage_index])
            so_far[kind, action.stage_index] += 1
