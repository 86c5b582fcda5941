"""Saves a run at intervals and resumes it: a run saved on N ranks resumes on M."""

import logging
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from torchlmoe.checkpoint.folders import abandon_after, clean, partial_of, published
from torchlmoe.checkpoint.manifest import verify
from torchlmoe.checkpoint.run_record import (
    Progress,
    check_same,
    fixed_of_model,
    fixed_of_run,
    load_step_of,
    read_run,
    write_run,
)
from torchlmoe.checkpoint.state import (
    OptimizerState,
    check_tensors,
    load_tensors,
    model_state,
    name_in_model,
    saved_tensors,
)
from torchlmoe.checkpoint.writer import CheckpointWriter, save_failure
from torchlmoe.config.load import to_toml
from torchlmoe.config.settings import Config
from torchlmoe.data.order import RowOrder
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.files import failures_to_write
from torchlmoe.model.decoder import Decoder
from torchlmoe.parallel.stages import elsewhere

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Checkpointer:
    """Saves and loads the checkpoints of a run. Every rank has one, and all ranks call its methods together.

    root: the folder of the run's checkpoints. With checkpoint.enable = false nothing is written or read.
    saved_step: the last step that is saved on disk, or None.
    """

    def __init__(
        self,
        root: Path,
        config: Config,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        order: RowOrder,
        *,
        vocab_size: int,
    ):
        self.root, self.settings = root, config.checkpoint
        self.saved_step: int | None = None
        self._saving_step: int | None = None
        self._pending: Future | None = None
        if not self.settings.enable:
            return
        self.model, self.optimizer_state = model, OptimizerState(model, optimizer)
        self.fixed = fixed_of_model(config, tokenizer, vocab_size)
        self.fixed |= fixed_of_run(config, order)
        self.order = order
        self.files = {"config.toml": to_toml(config).encode(), "tokenizer.json": tokenizer.content}
        # Creating a group waits for the address of each rank, up to the timeout if a rank has ended. A collective of
        # the existing group then fails immediately, so it comes first.
        dist.all_reduce(torch.zeros(1, device=next(model.parameters()).device))
        # A separate group: a save in the background must not wait for the step's collectives.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.parallelism.timeout_seconds))
        # Copies the tensors, also on a CPU, since the next step changes them while they are being saved.
        self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def load(self) -> Progress:
        """Load model and optimizer from the latest checkpoint, or from that of checkpoint.load_step.

        If the run has already resumed from checkpoint.load_step with this setting, the latest checkpoint is used.
        Returns the progress of the checkpoint; that of step 0 if there is none.
        Raises ValueError, on all ranks, naming the damaged file or the setting that has changed.
        """
        if not self.settings.enable:
            return Progress()
        folder, remedy = self._agree(self._choose, on_first=True)
        if folder is None:
            return Progress()

        saved: dict[str, TensorStorageMetadata] = {}

        def check() -> Progress:
            try:
                verify(folder, dist.get_rank(), dist.get_world_size())
            except ValueError as error:
                raise ValueError(f"{error}; {remedy}.") from error
            progress, fixed = read_run(folder)
            check_same(fixed, self.fixed, folder)
            saved.update(saved_tensors(folder))
            return progress

        progress = self._agree(check)
        state = model_state(self.model)
        if any(name.startswith("optimizer.") for name in saved):
            self.optimizer_state.create()
            self.optimizer_state.forget_all_but(saved.keys())
            state |= self.optimizer_state.tensors()
        others = elsewhere(self.model)

        def is_other(name: str) -> bool:
            return name_in_model(name) in others

        self._agree(lambda: check_tensors(state, saved, folder, is_other=is_other))
        load_tensors(state, folder, self.group, is_other=is_other)
        if self.settings.load_step is not None:
            for path in self._agree(lambda: abandon_after(self.root, progress.step), on_first=True):
                logger.info(f"Set aside a checkpoint later than checkpoint.load_step: {path}")
        logger.info(f"Resuming from {folder}: {progress.step:,} steps are done.")
        self.saved_step = progress.step
        return progress

    def after_step(self, progress: Progress, *, last: bool) -> None:
        """Save a checkpoint if one is due. After the last step, wait until it is on disk. Errors: see `save`."""
        if not self.settings.enable:
            return
        if self._pending is not None and self._pending.done():
            self.wait()
        due = last or progress.step % self.settings.interval == 0
        if due and progress.step not in (self.saved_step, self._saving_step):
            self.save(progress)
        if last:
            self.wait()

    def save(self, progress: Progress) -> None:
        """Save model, optimizer and progress. With async_mode = "async" it returns when they are copied.

        Raises OSError if this checkpoint, or the previous one in the background, cannot be written.
        """
        self.wait()
        facts = {
            "tokens_seen": self.order.tokens_of_steps(progress.step),
            "world_size": dist.get_world_size(),
            "load_step": self.settings.load_step,
        }
        files = {"run.json": write_run(progress, self.fixed, **facts), **self.files}
        writer = CheckpointWriter(self.root, progress.step, files, self.settings.keep_latest_k)
        state = model_state(self.model) | self.optimizer_state.tensors()
        self._saving_step = progress.step
        if self.settings.async_mode == "async":
            self._pending = dcp.async_save(  # type: ignore[assignment]  # another type only if staging is asynchronous
                state, storage_writer=writer, process_group=self.group, async_stager=self._stager
            )
        else:
            self._pending = Future()
            try:
                self._pending.set_result(dcp.save(state, storage_writer=writer, process_group=self.group))
            except CheckpointException as error:
                self._pending.set_exception(error)
            self.wait()

    def beside(self) -> str:
        """A clause that names the checkpoint being saved in the background; "" if there is none."""
        pending = self._pending
        return "" if pending is None or pending.done() else f", while step {self._saving_step} is saved"

    def wait(self) -> None:
        """Wait until the pending checkpoint is on disk. Raises OSError if it cannot be written."""
        if self._pending is None:
            return
        assert self._saving_step is not None
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except CheckpointException as error:
            remedy = "what was saved before is whole, and the same command continues from it"
            if dist.get_rank() == 0:
                shutil.rmtree(partial_of(self.root, self._saving_step), ignore_errors=True)
            raise save_failure(error, f"The checkpoint of step {self._saving_step}", self.root, remedy) from error
        self.saved_step = self._saving_step

    def _choose(self) -> tuple[Path | None, str]:
        """The folder to load, or None, and the remedy if it is damaged."""
        with failures_to_write("Checkpoints", self.root, "mend that, or set job.dump_folder to another folder"):
            self.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.root).close()
            clean(self.root)
        available, step = published(self.root), self.settings.load_step
        if step is not None and step not in available:
            steps = ", ".join(map(str, available)) or "none"
            raise ValueError(f"checkpoint.load_step = {step} is not in {self.root}; there are: {steps}.")
        if not available:
            return None, ""
        last = max(available)
        if step is not None and step < last and load_step_of(available[last]) == step:
            logger.info(
                f"checkpoint.load_step = {step} was used before; resuming from {available[last]}, which that run saved."
            )
            step = last
        step = last if step is None else step
        earlier = [other for other in available if other < step]
        if earlier and earlier[-1] == self.settings.load_step:
            remedy = f"move {available[step]} away to resume from the one before"
        elif earlier:
            remedy = f"start again with --checkpoint.load_step {earlier[-1]} to resume from the one before"
        else:
            remedy = f"there is none before it, so move {self.root} away to start anew"
        return available[step], remedy

    def _agree(self, function: Callable[[], T], *, on_first: bool = False) -> T:
        """Call function() on every rank, or only on the first. All ranks return the first rank's result.

        If it raises ValueError or OSError on any rank, all ranks raise that error.
        """
        result, error = None, None
        try:
            result = function() if dist.get_rank() == 0 or not on_first else None
        except (ValueError, OSError) as caught:
            error = caught
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (result, error), group=self.group)
        for _, error in answers:
            if error is not None:
                raise error
        return answers[0][0]
