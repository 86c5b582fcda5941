"""Writes the first checkpoint of a run that starts from an imported model, a few tensors at a time."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from torchlmoe.checkpoint.folders import partial_of, publish
from torchlmoe.checkpoint.manifest import describe, write_durably, write_manifest
from torchlmoe.checkpoint.run_record import Progress, fixed_of_model, write_run
from torchlmoe.checkpoint.tensor_files import write_shards
from torchlmoe.config.load import to_toml
from torchlmoe.config.settings import Config
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.files import failures_to_write

SHARD_BYTES = 2**29  # maximum size of a file, and of the tensors in memory


def write_first(
    root: Path,
    config: Config,
    tokenizer: Tokenizer,
    vocab_size: int,
    sizes: Mapping[str, int],
    tensors: Iterator[dict[str, Tensor]],
) -> Path:
    """Writes the checkpoint of step 0 into `root`, which has none yet, and returns its folder.

    The folder appears when it is complete. sizes: name -> bytes of the model's tensors, in the order of `tensors`.
    Raises OSError if it cannot be written; then nothing remains.
    """
    partial = partial_of(root, 0)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with failures_to_write("The checkpoint", root, "make room, or give another --output"):
            partial.mkdir(parents=True)
            prefixed = {f"model.{name}": size for name, size in sizes.items()}
            named = ({f"model.{name}": tensor for name, tensor in each.items()} for each in tensors)
            write_shards(partial, prefixed, named, SHARD_BYTES)
            fixed = fixed_of_model(config, tokenizer, vocab_size)
            files = {
                "run.json": write_run(Progress(), fixed),
                "config.toml": to_toml(config).encode(),
                "tokenizer.json": tokenizer.content,
            }
            for name, content in files.items():
                write_durably(partial / name, content)
            write_manifest(partial, {path.name: describe(path) for path in sorted(partial.iterdir())})
            publish(root, 0, keep_latest_k=1)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root / "step-00000000"
