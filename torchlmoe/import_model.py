"""Makes a checkpoint of an exported folder: python -m torchlmoe.import_model --model DIR --output DUMP_FOLDER

A run with that job.dump_folder, the model's settings and checkpoint.enable = true starts from its weights, with a fresh
optimizer and at step 0.
"""

import shutil
import warnings

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchlmoe.checkpoint import open_model
from torchlmoe.checkpoint.exported import is_exported
from torchlmoe.checkpoint.folders import name_of, partial_of, published
from torchlmoe.checkpoint.run_record import Progress, fixed_of_model, write_run
from torchlmoe.checkpoint.state import model_state
from torchlmoe.checkpoint.writer import CheckpointWriter, save_failure
from torchlmoe.command import FlagParser, run
from torchlmoe.config.load import to_toml


def main(arguments: list[str]) -> None:
    parser = FlagParser(prog="python -m torchlmoe.import_model", description=__doc__)
    parser.add_path("--model", required=True, help="what torchlmoe.export wrote")
    parser.add_path("--output", required=True, help="job.dump_folder of the run to start")
    options = parser.parse_args(arguments)
    root = options.output / "checkpoints"
    if published(root):
        raise ValueError(f"{root} holds checkpoints already: give another --output.")
    if not is_exported(options.model):
        raise ValueError(f"{options.model} is not what torchlmoe.export writes: it needs config.json and safetensors.")
    model, config, tokenizer = open_model(options.model)
    fixed = fixed_of_model(config, tokenizer, model.embedding.num_embeddings)
    files = {
        "run.json": write_run(Progress(), fixed),
        "config.toml": to_toml(config).encode(),
        "tokenizer.json": tokenizer.content,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
        try:
            dcp.save(model_state(model), storage_writer=CheckpointWriter(root, 0, files, keep_latest_k=1), no_dist=True)
        except CheckpointException as error:
            shutil.rmtree(partial_of(root, 0), ignore_errors=True)
            raise save_failure(error, "The checkpoint", root, "make room, or give another --output") from error
    print(f"imported to {root / name_of(0)}")


if __name__ == "__main__":
    run(main)
