"""Computes the learning rate of a step."""

import math

from torchlmoe.config.settings import LRScheduler


def lr_factor(step: int, num_steps: int, schedule: LRScheduler) -> float:
    """Returns the learning rate of step `step` (from 0) as a fraction of the peak.

    It rises linearly over `warmup_steps`, then falls to `min_lr_factor` at the last step: by a half cosine, linearly,
    or (wsd, arXiv 2404.06395) constant first and then linearly over the last `decay_fraction` of the steps.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    begin = schedule.warmup_steps
    if schedule.decay == "wsd":
        # A linear decay needs two steps: with fewer, it lasts from the last but one to the last.
        begin = max(begin, min(num_steps - round(schedule.decay_fraction * num_steps), num_steps - 2))
    progress = max(0.0, (step - begin) / max(1, num_steps - 1 - begin))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.decay == "cosine" else 1 - progress
    return schedule.min_lr_factor + (1 - schedule.min_lr_factor) * remaining
