"""Opens the token stores of a run, and checks that all ranks have the same data."""

import os
from typing import Any

import torch.distributed as dist

from torchlmoe.config.recall import recall_data, recall_options
from torchlmoe.config.settings import Data
from torchlmoe.data.order import Source
from torchlmoe.data.prepare import Effort, prepare
from torchlmoe.data.recall.store import RecallStore, recall_task
from torchlmoe.data.recall.tokenizer import symbol_tokenizer
from torchlmoe.data.store import TokenStore
from torchlmoe.data.tokenizer import Tokenizer, load_tokenizer


def training_sources(data: Data, tokenizer: Tokenizer) -> list[Source]:
    """Opens the stores of the training data, and tokenizes those that do not exist.

    Of a mixture, it opens the sources with a weight above 0. Raises ValueError if data cannot be read.
    """
    if not data.mixture:
        return [Source(_store("train", data, tokenizer, max_tokens=data.max_tokens))]
    sources = []
    for source in data.mixture:
        if source.weight > 0:
            options: dict[str, Any] = dict(
                dataset=source.dataset,
                dataset_config=source.dataset_config or data.dataset_config,
                dataset_revision=source.dataset_revision or data.dataset_revision,
                text_column=source.text_column or data.text_column,
                train_split=source.train_split or data.train_split,
                reader_options=source.reader_options,
                max_tokens=source.max_tokens or data.max_tokens,
            )
            sources.append(Source(_store("train", data, tokenizer, **options), source.weight, source.label))
    return sources


def load_tokenizer_of(data: Data) -> Tokenizer:
    """Returns the tokenizer of a run. For recall tasks it has a token per id of the largest vocabulary among them."""
    datasets = recall_data(data)
    if datasets[0][0] is None:
        return load_tokenizer(data.tokenizer, data.end_token)
    tasks = [(task, options) for task, options, _ in datasets if task]
    return symbol_tokenizer(max(RecallStore(task, "train", **options).vocab_size for task, options in tasks))


def validation_store(data: Data, tokenizer: Tokenizer) -> TokenStore:
    """Opens the store of the validation data, and tokenizes it if it does not exist."""
    return _store("validation", data, tokenizer, max_tokens=data.validation_max_tokens)


def _store(split: str, data: Data, tokenizer: Tokenizer, **options: Any) -> TokenStore:
    of_data: dict[str, Any] = dict(
        dataset=data.dataset,
        dataset_config=data.dataset_config,
        dataset_revision=data.dataset_revision,
        text_column=data.text_column,
        train_split=data.train_split,
        validation_split=data.validation_split,
        validation_dataset=data.validation_dataset,
        validation_fraction=data.validation_fraction,
        reader_options=data.reader_options,
        token_dtype=data.token_dtype,
    )
    options = of_data | options
    name = data.validation_dataset if split == "validation" and data.validation_dataset else options["dataset"]
    if (task := recall_task(name)) is not None:
        own = options["reader_options"] if name == options["dataset"] else recall_options(data, name)
        return RecallStore(task, split, **own)
    writer = data.writer
    if writer is None:
        writer = int(os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or 0)
    # With more hosts than writers, several hosts have the number of one writer. One of them writes, the others wait.
    effort = Effort(
        data.num_workers,
        data.num_writers,
        writer if data.writer is not None else writer % data.num_writers,
        data.writer_timeout_seconds,
    )
    cache_dir = data.cache_dir or "~/.cache/torchlmoe"
    return prepare(split=split, tokenizer=tokenizer, cache_dir=cache_dir, effort=effort, **options)


def check_same_data(sources: list[Source], validation: TokenStore | None) -> None:
    """Checks that all ranks have the same documents. All ranks call it before the first step.

    Hosts may have tokenized separately. Raises ValueError on all ranks if documents differ.
    """
    stores = [(f"data of {source.name!r}" if len(sources) > 1 else "training data", source.store) for source in sources]
    if validation is not None:
        stores.append(("validation data", validation))
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, [store.index.content for _, store in stores])
    for (name, _), contents in zip(stores, zip(*of_ranks, strict=True), strict=True):
        ranks_with: dict[str, list[int]] = {}
        for rank, content in enumerate(contents):
            ranks_with.setdefault(content, []).append(rank)
        if len(ranks_with) > 1:
            hashes = ", ".join(f"sha256 {content[:16]} on {_ranks(ranks)}" for content, ranks in ranks_with.items())
            raise ValueError(
                f"The {name} differs between hosts: {hashes}; give all of them the same files, revision and tokenizer, "
                "or copy one host's data.cache_dir to the others."
            )


def _ranks(ranks: list[int]) -> str:
    """A list of ranks in words, of bounded length."""
    shown = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
