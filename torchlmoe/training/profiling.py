"""Traces some training steps by torch.profiler, and records the history of the CUDA allocator."""

import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from torchlmoe.config.settings import Profiling


class StepProfiler:
    """Call `step` after every training step and `stop` after the last. Does nothing unless `profiling.enable` is set.

    Writes <dump_folder>/profile/step_<last traced step>_rank_<rank>.json.gz, for chrome://tracing or ui.perfetto.dev,
    and with `profiling.memory_snapshot` the same with .pickle, for pytorch.org/memory_viz.
    first_step: number of steps that were done before. Raises ValueError for a snapshot without CUDA.
    """

    def __init__(self, settings: Profiling, dump_folder: Path, rank: int, device: torch.device, first_step: int = 0):
        self._profile: profile | None = None
        if not settings.enable:
            return
        if settings.memory_snapshot and device.type != "cuda":
            raise ValueError(
                "profiling.memory_snapshot = true needs CUDA, whose allocator keeps a history; set it to false."
            )
        folder = dump_folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        if settings.memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

        def write(trace: profile) -> None:
            path = folder / f"step_{first_step + trace.step_num}_rank_{rank}"
            trace.export_chrome_trace(f"{path}.json.gz")
            if settings.memory_snapshot:
                torch.cuda.memory._dump_snapshot(f"{path}.pickle")

        # Each trace is written when it is complete, so its events may be cleared.
        warnings.filterwarnings("ignore", "(Warning: )?Profiler clears events")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        # The step before a trace warms the profiler up.
        action_of = schedule(
            skip_first=settings.first_step - 2,
            skip_first_wait=1,
            wait=settings.interval - settings.num_steps - 1,
            warmup=1,
            active=settings.num_steps,
        )
        self._profile = profile(
            activities=activities,
            schedule=lambda step: action_of(first_step + step),  # the profiler counts only this process's steps
            on_trace_ready=write,
        )
        self._profile.start()

    def step(self) -> None:
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
