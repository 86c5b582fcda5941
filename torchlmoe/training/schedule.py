"""Learning rate as a function of the step."""

import math

from torchlmoe.config.settings import LRScheduler


def lr_factor(step: int, num_steps: int, schedule: LRScheduler) -> float:
    """Learning rate of step `step` (from 0) over the peak.

    A linear rise over `warmup_steps`, then to `min_lr_factor` at the last step: by a half cosine, on a line, or
    (wsd, arXiv 2404.06395) flat and on a line over the last `decay_fraction` of the steps.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    begin = schedule.warmup_steps
    if schedule.decay == "wsd":
        # A line has two ends: a window of one step, or of none, falls to the last step from the one before.
        begin = max(begin, min(num_steps - round(schedule.decay_fraction * num_steps), num_steps - 2))
    progress = max(0.0, (step - begin) / max(1, num_steps - 1 - begin))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.decay == "cosine" else 1 - progress
    return schedule.min_lr_factor + (1 - schedule.min_lr_factor) * remaining
