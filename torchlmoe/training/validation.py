"""Validation loss and bits per byte of text, of the whole split or a part of it."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.config import Config
from torchlmoe.config_loader import validation_batch_size
from torchlmoe.data.loader import num_validation_rows, validation_batches, validation_text_bytes
from torchlmoe.data.store import TokenStore
from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.model.decoder import Decoder
from torchlmoe.parallel.mesh import data_place
from torchlmoe.training.metrics import duration

SECONDS_BETWEEN_LINES = 5.0
BATCHES_BETWEEN_LOOKS = 4  # a look at who asks to stop waits for all ranks


@torch.no_grad()
def validate(
    model: Decoder,
    store: TokenStore,
    config: Config,
    mesh: DeviceMesh,
    *,
    whole: bool,
    say: Callable[[str], None],
    asked_to_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Loss (nats per token) and bits per byte of text, of the whole split or its first `validation.max_batches`.

    All ranks call it. say: takes a line now and then about how far it has come.
    asked_to_stop: asked of every rank between batches; if one says so, all of them return None soon after.
    """
    settings, training = config.validation, config.training
    options: dict[str, Any] = dict(
        seq_len=training.seq_len,
        batch_size=validation_batch_size(config),
        max_batches=None if whole else settings.max_batches,
    )
    num_bytes = validation_text_bytes(store, **options)
    model.eval()
    device = model.embedding.weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    begin = last_said = time.monotonic()
    num_rows, (data_rank, data_ranks) = num_validation_rows(store, **options), data_place(mesh)
    batches = validation_batches(store, rank=data_rank, world_size=data_ranks, **options)
    for index, batch in enumerate(batches, start=1):
        if (index - 1) % BATCHES_BETWEEN_LOOKS == 0:
            num_stops = sums.new_tensor(asked_to_stop())
            dist.all_reduce(num_stops)
            if num_stops > 0:
                return None
        batch = batch.to(device)
        sums[0] += model(batch["tokens"], batch["document_bounds"], batch["labels"])
        sums[1] += (batch["labels"] != IGNORE_INDEX).sum() / mesh["cp"].size()  # whose ranks have the same
        if time.monotonic() - last_said > SECONDS_BETWEEN_LINES:
            last_said = time.monotonic()
            rows = min(num_rows, index * options["batch_size"] * data_ranks)
            left = (last_said - begin) / rows * (num_rows - rows)
            say(f"validating: row {rows:,} of {num_rows:,}, eta {duration(left)}")
    dist.all_reduce(sums)
    nll, num_tokens = sums.tolist()
    return {"val_loss": nll / num_tokens, "val_bits_per_byte": nll / math.log(2) / num_bytes}
