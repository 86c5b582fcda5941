"""Makes a checkpoint of an exported model: python -m torchlmoe.import_model --model DIR --output DUMP_FOLDER

DIR is an export of torchlmoe.export or of transformers' save_pretrained. A run with the settings in
DUMP_FOLDER/import/config.toml starts from its weights at step 0, with a new optimizer. These settings include
job.dump_folder and checkpoint.enable = true.
"""

from torchlmoe.checkpoint.companions import FOLDER, write_companions
from torchlmoe.checkpoint.first import write_first
from torchlmoe.checkpoint.folders import published
from torchlmoe.checkpoint.open import open_folder
from torchlmoe.checkpoint.tensor_files import with_progress
from torchlmoe.command import FlagParser, run
from torchlmoe.config.load import to_toml


def main(arguments: list[str]) -> None:
    parser = FlagParser(prog="python -m torchlmoe.import_model", description=__doc__)
    parser.add_path("--model", required=True, help="a folder that torchlmoe.export or transformers wrote")
    parser.add_path("--output", required=True, help="job.dump_folder of the run to start")
    options = parser.parse_args(arguments)
    root = options.output / "checkpoints"
    if published(root):
        raise ValueError(f"{root} holds checkpoints already: give another --output.")
    opened = open_folder(options.model)
    config, companions = opened.config, options.output / FOLDER
    config.job.dump_folder, config.checkpoint.enable = str(options.output), True
    config.data.tokenizer, config.data.end_token = str(companions), opened.tokenizer.end_token
    tensors = with_progress("Importing", opened.sizes, opened.tensors())
    place = write_first(root, config, opened.tokenizer, opened.vocab_size, opened.sizes, tensors)
    write_companions(options.output, {**opened.companions(), "config.toml": to_toml(config).encode()})
    print(f"imported to {place}; to train: train.py --job.config_file {companions / 'config.toml'}")


if __name__ == "__main__":
    run(main)
