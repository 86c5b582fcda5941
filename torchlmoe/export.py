"""Writes a model as a folder of safetensors: python -m torchlmoe.export --checkpoint DIR --output DIR [--format NAME]

The folder holds model.safetensors, or shards of it with an index, config.json and tokenizer.json. With --format, a
model_type of transformers, it is a folder that transformers loads.
"""

from torchlmoe.checkpoint import open_model
from torchlmoe.checkpoint.exported import write_exported
from torchlmoe.checkpoint.open import SavedFolder, resolve
from torchlmoe.checkpoint.transformers_export import write_transformers
from torchlmoe.command import FlagParser, run
from torchlmoe.interop.families import FAMILIES

OWN_FORMAT = "torchlmoe"


def main(arguments: list[str]) -> None:
    parser = FlagParser(prog="python -m torchlmoe.export", description=__doc__)
    parser.add_path("--checkpoint", required=True, help="a checkpoint, or a folder of them (the latest)")
    parser.add_path("--output", required=True, help="the folder to write; it must not exist")
    parser.add_argument(
        "--format", default=OWN_FORMAT, help=f"{OWN_FORMAT} (default), or a model_type: {', '.join(sorted(FAMILIES))}"
    )
    parser.add_argument("--max-shard-gib", type=float, default=2.0, help="maximum size of a file (default 2)")
    options = parser.parse_args(arguments)
    if not 0 < options.max_shard_gib <= 2**30:
        raise ValueError(f"--max-shard-gib {options.max_shard_gib} must be positive, and at most 2**30.")
    formats = [OWN_FORMAT, *sorted(FAMILIES)]
    if options.format not in formats:
        raise ValueError(f"--format {options.format} is unknown: choose from {', '.join(formats)}.")
    max_shard_bytes = max(1, int(options.max_shard_gib * 2**30))
    if options.format == OWN_FORMAT:
        model, config, tokenizer = open_model(options.checkpoint)
        write_exported(options.output, model, config, tokenizer, max_shard_bytes=max_shard_bytes)
    else:
        opened = SavedFolder(resolve(options.checkpoint))
        write_transformers(opened, options.output, options.format, max_shard_bytes=max_shard_bytes)
    print(f"exported to {options.output}")


if __name__ == "__main__":
    run(main)
