"""The training loop: data, model, optimizer and metrics of one run, on however many ranks.

The loss of a step is the mean over the tokens of its global batch, whatever ranks and microbatches it is cut into:
each microbatch contributes its sum over the global count, and gradients are summed over ranks.
"""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchlmoe.config import Config
from torchlmoe.config_loader import check_degrees, to_toml
from torchlmoe.data.loader import TrainLoader, validation_batches, validation_text_bytes
from torchlmoe.data.prepare import prepare
from torchlmoe.data.store import TokenStore
from torchlmoe.data.tokenizer import load_tokenizer
from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.model.decoder import count_parameters
from torchlmoe.parallel.mesh import build_mesh, choose_device, start_process_group, world_size_of_launch
from torchlmoe.parallel.parallelize import build_model
from torchlmoe.training.host_memory import keep_freed_pages
from torchlmoe.training.metrics import MetricsLog, duration, load_figures, memory_gib
from torchlmoe.training.optimizer import build_optimizer, clip_gradients
from torchlmoe.training.peak import peak_flops
from torchlmoe.training.schedule import lr_factor

SECONDS_BETWEEN_LINES = 5.0


class Trainer:
    """Sets a run up from its settings; `train` runs it. Raises ValueError for what cannot be built or read."""

    def __init__(self, config: Config):
        check_degrees(config, world_size_of_launch())
        self.config = config
        _start_logging()
        keep_freed_pages()
        self.device = choose_device(config.training.device)
        # Before the ranks are joined: while one tokenizes for an hour, no collective waits and times out.
        train_store, self.validation_store, vocab_size = self._prepare_data()
        start_process_group(self.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.training.seed)
        if config.training.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time

        training = config.training
        self.global_batch_size = training.global_batch_size or training.local_batch_size * self.world_size
        self.mesh = build_mesh(config.parallelism, self.device.type)
        self.model = build_model(config, vocab_size, self.mesh, self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.loader = TrainLoader(
            train_store,
            seq_len=training.seq_len,
            local_batch_size=training.local_batch_size,
            global_batch_size=self.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            seed=training.seed,
            num_prefetch=config.data.num_prefetch,
        )
        self.flops_per_token = 3 * self.model.flops_per_token(training.seq_len)  # backward costs two forwards
        peak = config.metrics.peak_tflops
        dtype = getattr(torch, training.dtype)
        self.peak_flops = peak_flops(self.device, dtype) if peak is None else 1e12 * peak
        folder = Path(config.job.dump_folder)
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.toml").write_text(to_toml(config))
        self.log = MetricsLog(folder, config.metrics, num_steps=training.steps, active=self.rank == 0)
        self._describe(train_store, vocab_size)

    def _prepare_data(self) -> tuple[TokenStore, TokenStore | None, int]:
        data = self.config.data
        tokenizer = load_tokenizer(data.tokenizer, data.end_token)
        vocab_size = self.config.model.vocab_size or tokenizer.vocab_size
        if vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size = {vocab_size} is less than the {tokenizer.vocab_size} tokens of data.tokenizer = "
                f"{data.tokenizer!r}; leave it unset or raise it."
            )

        def store(split: str, max_tokens: int | None) -> TokenStore:
            return prepare(
                data.dataset,
                split,
                tokenizer=tokenizer,
                cache_dir=data.cache_dir or "~/.cache/torchlmoe",
                dataset_config=data.dataset_config,
                text_column=data.text_column,
                train_split=data.train_split,
                validation_split=data.validation_split,
                validation_dataset=data.validation_dataset,
                validation_fraction=data.validation_fraction,
                max_tokens=max_tokens,
            )

        validation = store("validation", data.validation_max_tokens) if self.config.validation.enable else None
        return store("train", data.max_tokens), validation, vocab_size

    def _describe(self, store: TokenStore, vocab_size: int) -> None:
        total, active = (count_parameters(self.model, active=active) / 1e6 for active in (False, True))
        training = self.config.training
        epochs = training.steps * self.global_batch_size / self.loader.num_rows
        self.log.say(
            f"model: {total:.2f}M parameters, {active:.2f}M active, {len(self.model.blocks)} blocks "
            f"{self.config.model.layer_pattern}, vocabulary {vocab_size:,}, "
            f"{self.flops_per_token / 1e6:.1f} MFLOP a token\n"
            f"data: {store.num_tokens:,} tokens; {training.steps:,} steps of {self.global_batch_size} x "
            f"{training.seq_len} tokens are {epochs:.2f} epochs\n"
            f"run: {training.dtype} on {self.world_size} x {self.device.type}, metrics in {self.log.folder}"
        )

    def train(self) -> dict[str, Any]:
        """Runs all steps and returns the last logged record."""
        settings, steps = self.config.metrics, self.config.training.steps
        tokens_per_step = self.global_batch_size * self.config.training.seq_len
        record: dict[str, Any] = {}
        timed_steps, begin = 0, time.perf_counter()
        for index in range(steps):
            step = index + 1
            totals, grad_norm, lr = self.train_step(index)
            timed_steps += 1
            validates = self.validation_store is not None and (
                step == steps or step % self.config.validation.interval == 0
            )
            if step == 1 or step == steps or step % settings.log_freq == 0 or validates:
                figures = self._figures(totals)
                seconds = time.perf_counter() - begin
                speed = timed_steps * tokens_per_step / seconds
                record = {
                    "step": step,
                    "loss": figures.pop("loss"),
                    "grad_norm": grad_norm.item(),
                    "lr": lr,
                    "tokens_seen": step * tokens_per_step,
                    "tokens_per_second": speed,
                    "memory_gib": memory_gib(self.device),
                    **figures,
                }
                if self.peak_flops:
                    record["mfu"] = speed * self.flops_per_token / (self.peak_flops * self.world_size)
                if not math.isfinite(record["loss"]):
                    raise FloatingPointError(
                        f"The loss is {record['loss']} at step {step}; lower optimizer.lr, lengthen "
                        "lr_scheduler.warmup_steps, or look at the data of this step."
                    )
                if validates:
                    record |= self.validate(whole=step == steps)
                self.log.log(record)
                timed_steps, begin = 0, time.perf_counter()
        self.loader.close()
        self.log.close()
        return record

    def train_step(self, index: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Step `index` (from 0); returns the summed figures (see `_totals`), gradient norm and learning rate."""
        batches = [batch.to(self.device) for batch in self.loader.batches(index)]
        num_tokens = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in batches]).sum()
        dist.all_reduce(num_tokens)
        lr = self.config.optimizer.lr * lr_factor(index, self.config.training.steps, self.config.lr_scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        # Rows are all of one length, so that a microbatch's share of the step does not depend on how it is cut.
        share = self.config.training.local_batch_size / self.global_batch_size
        for batch in batches:
            nll = self.model(batch["tokens"], batch["document_bounds"], batch["labels"], share)
            loss = nll / num_tokens
            loss.backward()
            loss_sum += loss.detach()
        totals = self._totals(loss_sum)
        grad_norm = clip_gradients(self.model, self.config.training.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for layer, counts in zip(self.model.routed_layers().values(), self._by_layer(totals), strict=True):
            layer.end_step(counts["counts"].long())
        return totals, grad_norm, lr

    def _totals(self, loss_sum: torch.Tensor) -> torch.Tensor:
        """The loss and every router's counters, summed over ranks by one collective: float64, back to back."""
        parts = [loss_sum[None]]
        for layer in self.model.routed_layers().values():
            counters = layer.pop_counters()
            parts += [counters[name].double().reshape(-1) for name in ("counts", "dropped", "aux_loss", "z_loss")]
        totals = torch.cat(parts)  # counts stay exact: far below 2^53
        dist.all_reduce(totals)
        return totals

    def _by_layer(self, totals: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        rows = totals[1:].split([layer.load_balance.num_experts + 3 for layer in self.model.routed_layers().values()])
        return [{"counts": row[:-3], "dropped": row[-3], "aux_loss": row[-2], "z_loss": row[-1]} for row in rows]

    def _figures(self, totals: torch.Tensor) -> dict[str, Any]:
        totals = totals.cpu()
        figures: dict[str, Any] = {"loss": totals[0].item()}
        for name, layer in zip(self.model.routed_layers(), self._by_layer(totals), strict=True):
            layer_figures = {
                **load_figures(layer["counts"]),
                "aux_loss": layer["aux_loss"].item(),
                "z_loss": layer["z_loss"].item(),
                "dropped_fraction": (layer["dropped"] / layer["counts"].sum()).item(),
            }
            figures |= {f"{name}/{key}": value for key, value in layer_figures.items()}
        return figures

    @torch.no_grad()
    def validate(self, *, whole: bool) -> dict[str, float]:
        """Loss (nats per token) and bits per byte of text, of the whole split or its first `validation.max_batches`."""
        assert self.validation_store is not None
        settings, training = self.config.validation, self.config.training
        options: dict[str, Any] = dict(
            seq_len=training.seq_len,
            batch_size=settings.local_batch_size or training.local_batch_size,
            world_size=self.world_size,
            max_batches=None if whole else settings.max_batches,
        )
        num_bytes = validation_text_bytes(self.validation_store, **options)
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        begin = last_said = time.monotonic()
        num_rows = -(-self.validation_store.num_tokens // training.seq_len)
        for index, batch in enumerate(validation_batches(self.validation_store, rank=self.rank, **options), start=1):
            batch = batch.to(self.device)
            sums[0] += self.model(batch["tokens"], batch["document_bounds"], batch["labels"])
            sums[1] += (batch["labels"] != IGNORE_INDEX).sum()
            if time.monotonic() - last_said > SECONDS_BETWEEN_LINES:
                last_said = time.monotonic()
                rows = min(num_rows, index * options["batch_size"] * self.world_size)
                left = (last_said - begin) / rows * (num_rows - rows)
                self.log.say(f"validating: row {rows:,} of {num_rows:,}, eta {duration(left)}")
        dist.all_reduce(sums)
        nll, num_tokens = sums.tolist()
        return {"val_loss": nll / num_tokens, "val_bits_per_byte": nll / math.log(2) / num_bytes}


def _start_logging() -> None:
    """Warnings of every library, and our own news, from the first rank; from the others errors only."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("torchlmoe").setLevel(logging.INFO if first else logging.ERROR)
