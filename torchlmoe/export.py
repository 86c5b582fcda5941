"""Writes a model as a folder of safetensors: python -m torchlmoe.export --checkpoint DIR --output DIR

The folder holds model.safetensors, or shards of it with an index, config.json and tokenizer.json.
"""

from torchlmoe.checkpoint import open_model
from torchlmoe.checkpoint.exported import write_exported
from torchlmoe.command import FlagParser, run


def main(arguments: list[str]) -> None:
    parser = FlagParser(prog="python -m torchlmoe.export", description=__doc__)
    parser.add_path("--checkpoint", required=True, help="a checkpoint, or a folder of them (the latest)")
    parser.add_path("--output", required=True, help="the folder to write, not there yet")
    parser.add_argument("--max-shard-gib", type=float, default=5.0, help="a file's size at most (default 5)")
    options = parser.parse_args(arguments)
    if not 0 < options.max_shard_gib <= 2**30:
        raise ValueError(f"--max-shard-gib {options.max_shard_gib} must be positive, and at most 2**30.")
    model, config, tokenizer = open_model(options.checkpoint)
    write_exported(options.output, model, config, tokenizer, max_shard_bytes=max(1, int(options.max_shard_gib * 2**30)))
    print(f"exported to {options.output}")


if __name__ == "__main__":
    run(main)
