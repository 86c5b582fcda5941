"""Computes validation loss and bits per byte, of the whole validation split or a part of it."""

import math
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

from torchlmoe.config.batch import validation_batch_size
from torchlmoe.config.settings import Config
from torchlmoe.data.loader import num_validation_rows, validation_batches, validation_text_bytes
from torchlmoe.data.store import TokenStore
from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.training.metrics import duration
from torchlmoe.training.step import Step

SECONDS_BETWEEN_LINES = 5.0
BATCHES_BETWEEN_CHECKS = 4  # at least, since a check for stop requests waits for all ranks


def validate(
    step: Step,
    store: TokenStore,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    *,
    whole: bool,
    say: Callable[[str], None],
    asked_to_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Returns val_loss (nats per token) and, if the data is text, val_bits_per_byte. All ranks call it.

    whole: validate on the whole split, instead of its first `validation.max_batches` batches.
    say: called with a line about the progress every few seconds.
    asked_to_stop: called between batches. If it returns True on one rank, all ranks return None soon after.
    """
    settings, training = config.validation, config.training
    options: dict[str, Any] = dict(
        seq_len=training.seq_len,
        batch_size=validation_batch_size(config),
        max_batches=None if whole else settings.max_batches,
    )
    num_bytes = validation_text_bytes(store, **options)
    nll, num_tokens = torch.zeros(2, dtype=torch.float64, device=device).unbind()
    begin = last_said = time.monotonic()
    num_rows = num_validation_rows(store, **options)
    batches = validation_batches(store, rank=ranks.row_index, world_size=ranks.num_row_places, **options)
    done = next_check = 0
    while group := [batch.to(device) for batch in islice(batches, step.batches_at_once)]:
        if done >= next_check:
            if ranks.total(nll.new_tensor(asked_to_stop())) > 0:
                return None
            next_check = done + BATCHES_BETWEEN_CHECKS
        nll += step.evaluate(group)
        num_tokens += torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in group]).sum()
        done += len(group)
        if time.monotonic() - last_said > SECONDS_BETWEEN_LINES:
            last_said = time.monotonic()
            rows = min(num_rows, done * options["batch_size"] * ranks.num_row_places)
            remaining = (last_said - begin) / rows * (num_rows - rows)
            say(f"validating: row {rows:,} of {num_rows:,}, eta {duration(remaining)}")
    loss_sum, tokens = ranks.total(ranks.own_loss(nll)).item(), ranks.total_of_rows(num_tokens).item()
    figures = {"val_loss": loss_sum / tokens}
    return figures | ({"val_bits_per_byte": loss_sum / math.log(2) / num_bytes} if store.is_text else {})
