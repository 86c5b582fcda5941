"""Opens a trained model, from a checkpoint of a run or from an exported folder."""

from pathlib import Path

import torch

from torchlmoe.checkpoint.exported import is_exported, read_exported
from torchlmoe.checkpoint.folders import is_published, published
from torchlmoe.checkpoint.manifest import NAME, verify
from torchlmoe.checkpoint.run_record import read_run
from torchlmoe.checkpoint.state import load_tensors, model_state, saved_tensors
from torchlmoe.config import Config
from torchlmoe.config_loader import load_config
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.model.decoder import Decoder, build_on_meta


def open_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Decoder, Config, Tokenizer]:
    """The whole model on one device, in eval mode, with the settings and the tokenizer it was trained with.

    folder: one checkpoint (step-...), the folder of a run or of its checkpoints (the latest is taken), or what
        torchlmoe.export wrote.
    dtype: of the parameters; as saved if None. Modules marked `float32_island` stay in at least float32.
    Raises ValueError, naming the file, where something is missing or damaged.
    """
    folder = resolve(Path(folder))
    if is_exported(folder):
        config, tokenizer, vocab_size = read_exported(folder)
        prefix = ""
    else:
        try:
            verify(folder)
        except ValueError as error:
            raise ValueError(f"{error}; give another checkpoint.") from error
        config = load_config(["--job.config_file", str(folder / "config.toml")])
        _, fixed = read_run(folder)
        tokenizer = Tokenizer(folder / "tokenizer.json", fixed["data.end_token"])
        vocab_size, prefix = fixed["model.vocab_size"], "model."
    if dtype is None:
        _, dtype = saved_tensors(folder).get(f"{prefix}embedding.weight", (None, torch.float32))
    model = build_on_meta(config, vocab_size).to(dtype)
    for module in model.modules():
        if getattr(module, "float32_island", False):
            module.to(torch.promote_types(dtype, torch.float32))
    model.to_empty(device=device)
    model.init_weights(0)  # for the buffers that are not saved
    load_tensors(model_state(model, prefix), folder)
    return model.eval(), config, tokenizer


def resolve(folder: Path) -> Path:
    """The checkpoint or exported folder that is meant. Raises ValueError where there is none."""
    if (folder / NAME).is_file() or is_published(folder) or is_exported(folder):
        return folder
    for root in (folder, folder / "checkpoints"):
        if available := published(root):
            return available[max(available)]
    raise ValueError(
        f"{folder} holds no checkpoint: give a folder step-..., the job.dump_folder of a run that saved some, or what "
        "torchlmoe.export wrote."
    )
