"""Tokenizes the data of a run before the run: python -m torchlmoe.prepare [--job.config_file FILE ...]

Takes the settings of train.py, which then finds the tokens in data.cache_dir. It needs no GPU. Several hosts that share
this folder work together with data.num_writers; data.writer, torchrun or SLURM gives each host its number. If it is
killed, the same command continues.
"""

import logging

from torchlmoe.command import run
from torchlmoe.config.load import load_config
from torchlmoe.config.recall import recall_data
from torchlmoe.data.store import TokenStore
from torchlmoe.training.data import load_tokenizer_of, training_sources, validation_store


def main(arguments: list[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__, end="")
        return
    config = load_config(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("torchlmoe").setLevel(logging.INFO)
    task, _, dataset = recall_data(config.data)[0]
    if task is not None:
        raise ValueError(f"{dataset} is drawn from a seed when it is read: there is nothing to prepare.")
    tokenizer = load_tokenizer_of(config.data)
    if config.validation.enable:
        _say("validation", validation_store(config.data, tokenizer))
    for source in training_sources(config.data, tokenizer):
        _say("training" if not config.data.mixture else source.name, source.store)


def _say(name: str, store: TokenStore) -> None:
    counts = f"{store.num_tokens:,} tokens, {store.num_documents:,} documents"
    print(f"{name}: {counts}, sha256 {store.index.content[:16]}, in {store.folder}")


if __name__ == "__main__":
    run(main)
