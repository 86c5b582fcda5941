"""Runs a step through a pipeline, by the schedules of torch.distributed.pipelining.

A pipeline's microbatches are those of gradient accumulation. Each stage gets all of them from the loader of its rank;
stages send only activations and their gradients. Schedules that split the backward in two are not supported: the
counters of routed layers are gradients of a buffer, which such a backward does not compute.
"""

import logging
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from torchlmoe.config.batch import batch_sizes, num_stages, validation_batch_size
from torchlmoe.config.settings import Config
from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.model.decoder import Decoder
from torchlmoe.parallel.islands import sum_island_gradients
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.parallel.shared import SharedParameters
from torchlmoe.parallel.stages import Pipeline

# If an action fails, torch raises an error and also logs the whole order of the schedule.
logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)


class PipelineStep:
    """A `Step` for a model with a `pipeline`.

    pipeline_stages, schedule: torch's objects for training. The planner reads them.
    """

    def __init__(self, model: Decoder, config: Config, ranks: Ranks, device: torch.device):
        assert isinstance(model.pipeline, Pipeline)
        self.model, self.ranks, self.device = model, ranks, device
        self.stages, self.is_interleaved = model.pipeline.stages, len(model.pipeline.stages) > 1
        self.shared = SharedParameters(model.pipeline.names, ranks, config.parallelism.timeout_seconds)
        self.counted_elsewhere: Set[str] = self.shared.counted_elsewhere
        self.num_stages, self.batches_at_once = num_stages(config), ranks["pp"].size()
        rows, whole = batch_sizes(config.training, ranks.num_row_places)
        self.share = rows / whole
        seq_len, dtype = config.training.seq_len, config.training.dtype_on(device.type)
        self._num_tokens = torch.ones((), device=device)
        self.pipeline_stages, self.schedule = self._schedule(
            whole // (rows * ranks.num_row_places), rows * seq_len, dtype, lambda nll, labels: nll / self._num_tokens
        )
        # A separate schedule for evaluation: a schedule that switches between both sets up its stages each time.
        _, self._evaluation = self._schedule(
            self.batches_at_once, validation_batch_size(config) * seq_len, dtype, lambda nll, labels: nll
        )

    def _schedule(
        self, num_microbatches: int, num_tokens: int, dtype: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[list[PipelineStage], Any]:
        stages = []
        for stage in self.stages:
            inputs, outputs = stage.examples(num_tokens, dtype)
            group = self.ranks["pp"].get_group()
            stages.append(
                PipelineStage(
                    stage,
                    stage.place.index,
                    self.num_stages,
                    self.device,
                    input_args=inputs,
                    output_args=outputs,
                    group=group,
                )
            )
        # scale_grads = False: the loss is already divided by the number of tokens.
        if self.is_interleaved:
            return stages, ScheduleInterleaved1F1B(stages, num_microbatches, loss, scale_grads=False)  # type: ignore[arg-type]
        return stages, Schedule1F1B(stages[0], num_microbatches, loss, scale_grads=False)

    def forward_backward(self, batches: Sequence[Any], num_tokens: Tensor) -> Tensor:
        self._num_tokens = num_tokens
        for stage in self.stages:
            stage.train()
        loss = self._run(self.schedule.step, batches, loss_weight=self.share)
        sum_island_gradients(self.model)
        self.shared.sum_gradients(self.model)
        return loss

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any]) -> Tensor:
        for stage in self.stages:
            stage.eval()
        # Copies without labels make up the number of batches that the schedule needs.
        filler = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORE_INDEX)}
        return self._run(self._evaluation.eval, [*batches, *[filler] * (self.batches_at_once - len(batches))])

    def _run(self, schedule: Callable[..., Any], batches: Sequence[Any], **options: Any) -> Tensor:
        """The sum of the microbatches' losses, float64; zero on ranks without the last stage."""
        losses: list[Tensor] = []
        inputs = {key: torch.cat([batch[key] for batch in batches]) for key in ("tokens", "document_bounds", "labels")}
        schedule(**inputs, **options, target=inputs["labels"], losses=losses, return_outputs=False)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            loss_sum += loss.detach()
        return loss_sum
