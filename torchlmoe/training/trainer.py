"""The training loop: data, model, optimizer and metrics of one run, on any number of ranks.

The loss of a step is the mean over the tokens of its global batch, for any number of ranks and microbatches: each
microbatch contributes its sum divided by the global number of tokens, and gradients are summed over ranks.
"""

import logging
import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from torchlmoe.checkpoint.checkpointer import Checkpointer
from torchlmoe.config.batch import batch_sizes, check_degrees, validation_batch_size
from torchlmoe.config.idle import idle_settings
from torchlmoe.config.load import to_toml
from torchlmoe.config.settings import Config
from torchlmoe.data.loader import TrainLoader, validation_text_bytes
from torchlmoe.data.order import RowOrder, Source
from torchlmoe.data.store import TokenStore
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.files import failures_to_write
from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.model.decoder import Decoder, count_parameters
from torchlmoe.parallel.failures import collective_failures
from torchlmoe.parallel.heartbeat import Heartbeat
from torchlmoe.parallel.mesh import choose_device, join_launch, start_process_group, world_size_of_launch
from torchlmoe.parallel.parallelize import build_model, whole_model
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.parallel.stages import describe_stages
from torchlmoe.training.counters import Counters
from torchlmoe.training.data import check_same_data, load_tokenizer_of, training_sources, validation_store
from torchlmoe.training.host_memory import keep_freed_pages
from torchlmoe.training.metrics import MetricsLog, memory_gib
from torchlmoe.training.optimizer import build_optimizer, clip_gradients, set_lr
from torchlmoe.training.peak import peak_flops
from torchlmoe.training.profiling import StepProfiler
from torchlmoe.training.schedule import lr_factor
from torchlmoe.training.step import build_step
from torchlmoe.training.stop_request import StopRequest
from torchlmoe.training.validation import validate


class Trainer:
    """Sets up a run from its settings; `train` runs it. Raises ValueError if the model or the data cannot be used.

    A trainer holds files, threads and the lock of the dump folder until `train` ends, even with an error, or `close` is
    called. If the constructor fails, it releases them.
    """

    def __init__(self, config: Config):
        with ExitStack() as resources:
            self._set_up(config, resources)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Release files, threads and locks. `train` calls it at its end."""
        self._resources.close()

    def _set_up(self, config: Config, resources: ExitStack) -> None:
        check_degrees(config, world_size_of_launch())
        self.config = config
        _start_logging()
        keep_freed_pages()
        self.device = choose_device(config.training.device)
        # Before the ranks join, so that no collective times out while one rank tokenizes for an hour.
        sources, self.validation_store, tokenizer, whole = self._prepare_data()
        vocab_size = whole.spec.vocab_size
        folder = Path(config.job.dump_folder)
        if os.environ.get("RANK", "0") == "0":
            resources.callback(_lock(folder).release)
        timeout = config.parallelism.timeout_seconds
        self.heartbeat = resources.enter_context(Heartbeat())
        with collective_failures(self.heartbeat, timeout):
            launch = join_launch(timeout)
            self.rank, self.world_size = launch.rank, launch.world_size
            # Shorter than NCCL's timeout, whose watchdog aborts the process.
            patience = max(timeout / 2, timeout - 10) if self.device.type == "cuda" else None
            self.heartbeat.start(*launch, patience)
            start_process_group(self.device, timeout, launch)
            check_same_data(sources, self.validation_store)
            if config.training.deterministic:
                torch.use_deterministic_algorithms(True)
                torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time

            training = config.training
            self.ranks = Ranks(config.parallelism, self.device.type)
            self.local_batch_size, self.global_batch_size = batch_sizes(training, self.ranks.num_row_places)
            self.model = build_model(config, vocab_size, self.ranks, self.device)
            self.step = build_step(self.model, config, self.ranks, self.device)
            self.counters = Counters(self.model.counter_sizes)
            self.optimizer = build_optimizer(self.model, config.optimizer)
            self.order = RowOrder(
                sources, seq_len=training.seq_len, global_batch_size=self.global_batch_size, seed=training.seed
            )
            self.loader = TrainLoader(
                self.order,
                local_batch_size=self.local_batch_size,
                rank=self.ranks.row_index,
                world_size=self.ranks.num_row_places,
                num_prefetch=config.data.num_prefetch,
            )
            resources.callback(self.loader.close)
            self.flops_per_token = 3 * whole.flops_per_token(training.seq_len)  # backward costs two forwards
            peak = config.metrics.peak_tflops
            dtype = training.dtype_on(self.device.type)
            self.peak_flops = peak_flops(self.device, dtype) if peak is None else 1e12 * peak
            self.checkpointer = Checkpointer(
                folder / "checkpoints",
                config,
                self.model,
                self.optimizer,
                tokenizer,
                self.order,
                vocab_size=vocab_size,
            )
            self.heartbeat.beside = self.checkpointer.beside
            self.heartbeat.at("loading the checkpoint")
            self.progress = self.checkpointer.load()
        self.stop_request, self.stopping = StopRequest(), False
        self.stamp = folder / "finished"  # exists once all steps are done and logged
        if self.rank == 0:
            self.stamp.unlink(missing_ok=True)
            with failures_to_write("The settings", folder / "config.toml", "make room, or set another job.dump_folder"):
                (folder / "config.toml").write_text(to_toml(config))
        self.profiler = StepProfiler(config.profiling, folder, self.rank, self.device, self.progress.step)
        resources.callback(self.profiler.stop)
        self.log = MetricsLog(
            folder,
            config.metrics,
            num_steps=training.steps,
            active=self.rank == 0,
            first_step=self.progress.step,
        )
        resources.callback(self.log.close)
        self._describe(whole)

    def _prepare_data(self) -> tuple[list[Source], TokenStore | None, Tokenizer, Decoder]:
        """Returns training and validation data, the tokenizer, and the whole model on the meta device."""
        data = self.config.data
        tokenizer = load_tokenizer_of(data)
        vocab_size = self.config.model.vocab_size or tokenizer.vocab_size
        if vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size = {vocab_size} is less than the {tokenizer.vocab_size} tokens of data.tokenizer = "
                f"{data.tokenizer!r}; raise it or leave it unset."
            )
        # Built first, so that settings that do not fit raise an error before tokenizing.
        whole = whole_model(self.config, vocab_size, world_size_of_launch())
        validation = validation_store(data, tokenizer) if self.config.validation.enable else None
        if validation is not None:  # raises an error now if the first validation could not count bytes
            validation_text_bytes(
                validation,
                seq_len=self.config.training.seq_len,
                batch_size=validation_batch_size(self.config),
                max_batches=self.config.validation.max_batches,
            )
        return training_sources(data, tokenizer), validation, tokenizer, whole

    def _describe(self, whole: Decoder) -> None:
        total, active = (count_parameters(whole, active=active) / 1e6 for active in (False, True))
        training = self.config.training
        dtype = str(training.dtype_on(self.device.type)).removeprefix("torch.")
        rows = self.order.rows_of_sources(training.steps * self.global_batch_size)
        epochs = ", ".join(
            f"{count / size:.2f} epochs" + f" of {source.name}" * (len(rows) > 1)
            for count, size, source in zip(rows, self.order.num_rows, self.order.sources, strict=True)
        )
        self.log.say(
            f"model: {total:.2f}M parameters, {active:.2f}M active, {len(whole.blocks)} blocks "
            f"{self.config.model.layer_pattern}, vocabulary {whole.spec.vocab_size:,}, "
            f"{self.flops_per_token / 1e6:.1f} MFLOP a token\n"
            f"data: {self.order.num_tokens:,} tokens; {training.steps:,} steps of {self.global_batch_size} x "
            f"{training.seq_len} tokens are {epochs}\n"
            f"run: {dtype} on {self.world_size} x {self.device.type}, metrics in {self.log.folder}"
        )
        if self.config.parallelism.pipeline_parallel_degree > 1:
            self.log.say(describe_stages(whole, self.config))
        if modules := self.config.job.custom_modules:
            self.log.say(f"modules: {', '.join(modules)}")
        for name, condition in idle_settings(self.config).items():
            self.log.say(f"{name} has no effect in this run: it needs {condition}.")

    def train(self) -> dict[str, Any]:
        """Run the remaining steps, or fewer if a signal requests a stop. Returns the last logged record.

        Raises FloatingPointError for a loss or gradient that is not finite unless training.non_finite = "skip",
        ConnectionError or TimeoutError if another rank is lost or late, and OSError if files cannot be written.
        """
        with self._resources:
            self._run()
        return self.log.records[-1] if self.log.records else {}

    def _run(self) -> None:
        settings, steps = self.config.metrics, self.config.training.steps
        tokens_per_step = self.global_batch_size * self.config.training.seq_len
        timed_steps, begin = 0, time.perf_counter()
        timeout = self.config.parallelism.timeout_seconds
        # The signal with which a launcher ends the remaining ranks must not interrupt their error messages.
        with self.stop_request, collective_failures(self.heartbeat, timeout):
            if self._was_cut_off():
                self._validate_and_log()
            while self.progress.step < steps and not self.stopping:
                step = self.progress.step + 1
                totals, grad_norm, lr = self.train_step(step - 1)
                self.profiler.step()
                timed_steps += 1
                self.progress.record = {}
                if step in (1, steps) or step % settings.log_freq == 0 or self._validates(step):
                    speed = timed_steps * tokens_per_step / (time.perf_counter() - begin)
                    self.progress.record = self._record(step, totals, grad_norm, lr, speed)
                paused = time.perf_counter()
                # Save before the validation, so that a resumed run repeats an interrupted validation.
                self._save_if_due(last=step == steps or self.stopping)
                begin += time.perf_counter() - paused
                if self.progress.record:
                    self._validate_and_log()
                    timed_steps, begin = 0, time.perf_counter()
        self._end()

    def _save_if_due(self, *, last: bool) -> None:
        self.heartbeat.at("saving", self.progress.step)
        self.checkpointer.after_step(self.progress, last=last)

    def _validates(self, step: int) -> bool:
        last = step == self.config.training.steps
        return self.validation_store is not None and (last or step % self.config.validation.interval == 0)

    def _was_cut_off(self) -> bool:
        """Whether the previous run saved its last step but stopped before logging it."""
        is_unlogged = bool(self.progress.record) and self.log.last_step < self.progress.step
        # Only the first rank knows the log.
        of_first_rank = torch.tensor(float(is_unlogged and self.rank == 0), device=self.device)
        dist.all_reduce(of_first_rank)
        return of_first_rank.item() > 0

    def _validate_and_log(self) -> None:
        """Validate if due, and log the step. If a signal interrupts the validation, the resumed run does both."""
        figures: dict[str, float] | None = {}
        if self._validates(self.progress.step):
            assert self.validation_store is not None
            self.heartbeat.at("validation", self.progress.step)
            figures = validate(
                self.step,
                self.validation_store,
                self.config,
                self.ranks,
                self.device,
                whole=self.progress.step == self.config.training.steps,
                say=self.log.say,
                asked_to_stop=lambda: self.stop_request.name is not None,
            )
        if figures is None:
            self.stopping = True
            self._save_if_due(last=True)
        else:
            self.log.log(self.progress.record | figures)

    def _end(self) -> None:
        self.log.finish()
        finished = self.log.last_step == self.progress.step >= self.config.training.steps
        if self.rank == 0 and finished:
            self.stamp.touch()
        if self.stopping and not finished:
            self._say_how_it_stopped()

    def train_step(self, index: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Run step `index` (from 0). Returns the totals over ranks (see `_totals`), gradient norm and learning rate."""
        training, step = self.config.training, index + 1
        self.heartbeat.at("data", step)
        # Seeds depend only on (seed, step, rank), so resuming restores no generator state.
        torch.manual_seed(
            int(np.random.SeedSequence((training.seed, index, self.rank)).generate_state(1, np.uint64)[0])
        )
        batches = [batch.to(self.device) for batch in self.loader.batches(index)]
        num_tokens = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in batches]).sum()
        num_tokens = self.ranks.total_of_rows(num_tokens)
        factor = lr_factor(index, training.steps, self.config.lr_scheduler)
        set_lr(self.optimizer, factor)
        self.heartbeat.at("forward and backward", step)
        loss_sum = self.step.forward_backward(batches, num_tokens)
        self.heartbeat.at("gradient norm", step)
        totals = self._totals(loss_sum)
        grad_norm = clip_gradients(self.model, training.max_norm, self.step.counted_elsewhere)
        # Only here the CPU waits for the step's results, before the optimizer runs.
        loss_value, num_stops, norm = torch.stack([*totals[:2], grad_norm.to(totals.dtype)]).tolist()
        self.stopping = num_stops > 0
        if math.isfinite(loss_value) and math.isfinite(norm):
            self.heartbeat.at("optimizer", step)
            self.optimizer.step()
            counters = self.counters.by_layer(totals[2:])
            for name, layer in self.model.routed_layers().items():
                layer.end_step(counters[name]["counts"].long())
        else:
            self._skip_or_stop(step, loss_value, norm)
        self.optimizer.zero_grad()
        self.progress.step = step
        return totals, grad_norm, factor * self.config.optimizer.lr

    def _skip_or_stop(self, step: int, loss: float, grad_norm: float) -> None:
        problem = f"The loss is {loss} and the gradient's norm {grad_norm} at step {step}"
        if self.config.training.non_finite == "skip":
            self.progress.skipped_steps += 1
            self.log.say(f"{problem}: skipped, the {self.progress.skipped_steps}. so far.")
            return
        self.checkpointer.wait()
        saved = self.checkpointer.saved_step
        raise FloatingPointError(
            f"{problem}; lower optimizer.lr, lengthen lr_scheduler.warmup_steps, set training.non_finite = 'skip' or "
            f"look at the data of this step; the last good checkpoint is "
            f"{'none' if saved is None else f'of step {saved}'}."
        )

    def _say_how_it_stopped(self) -> None:
        why = self.stop_request.name or "a signal to another rank"
        if self.checkpointer.saved_step == self.progress.step:
            saved = f"saved in {self.checkpointer.root}; the same command continues from there"
        else:
            saved = "nothing was saved, since checkpoint.enable is false"
        self.log.say(f"Stopped after step {self.progress.step} by {why}: {saved}.")

    def _totals(self, loss_sum: torch.Tensor) -> torch.Tensor:
        """Loss, number of ranks with a request to stop, and all counters: a float64 vector, summed over ranks."""
        stops = loss_sum.new_tensor([self.stop_request.name is not None])
        loss_sum = self.ranks.own_loss(loss_sum)
        return self.ranks.total(torch.cat([loss_sum[None], stops, self.counters.pop(self.model, self.device)]))

    def _record(
        self, step: int, totals: torch.Tensor, grad_norm: torch.Tensor, lr: float, speed: float
    ) -> dict[str, Any]:
        """The record of a step. totals: see `_totals`. speed: tokens per second."""
        totals = totals.cpu()
        figures: dict[str, Any] = {
            "step": step,
            "loss": totals[0].item(),
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens_seen": self.order.tokens_of_steps(step),
            **self.order.figures(step),
            "tokens_per_second": speed,
            "memory_gib": memory_gib(self.device),
            "skipped_steps": self.progress.skipped_steps,
        }
        if self.peak_flops:
            figures["mfu"] = speed * self.flops_per_token / (self.peak_flops * self.world_size)
        return figures | self.counters.figures(totals[2:])


def _lock(folder: Path) -> FileLock:
    """Locks a dump folder, since a second run would overwrite its files. Raises ValueError if another run holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another run writes to {folder}: wait until it ends, or set another job.dump_folder."
        ) from None
    return lock


def _start_logging() -> None:
    """Shows warnings of all libraries and torchlmoe's messages on the first rank, and only errors on the others."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("torchlmoe").setLevel(logging.INFO if first else logging.ERROR)
