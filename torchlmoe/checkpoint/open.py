"""Opens a trained model, from a checkpoint of a run or from an exported folder."""

import logging
from pathlib import Path

import torch

from torchlmoe.checkpoint.exported import config_of_file, is_exported, read_exported
from torchlmoe.checkpoint.folders import is_published, published
from torchlmoe.checkpoint.manifest import NAME, verify
from torchlmoe.checkpoint.run_record import differences, fixed_of_model, read_run
from torchlmoe.checkpoint.state import check_tensors, load_tensors, model_state, saved_tensors
from torchlmoe.config.settings import Config
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.files import expanded, read_toml
from torchlmoe.model.decoder import Decoder, build_on_meta

logger = logging.getLogger(__name__)


def open_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Decoder, Config, Tokenizer]:
    """The whole model on one device, in eval mode, with the settings and the tokenizer it was trained with.

    folder: one checkpoint (step-...), the folder of a run or of its checkpoints (the latest is taken), or what
        torchlmoe.export wrote.
    dtype: of the parameters; as saved if None. Modules marked `float32_island` stay in at least float32.
    A run that saves and prunes may remove its newest checkpoint while it is read. The then newest is read instead.
    Raises ValueError, naming the file, where something is missing or damaged.
    """
    try:
        given = Path(expanded(str(folder)))
    except ValueError as error:
        raise ValueError(f"The folder {str(folder)!r} is not valid: it {error}.") from None
    while True:
        chosen = resolve(given)
        try:
            return _open(chosen, dtype, device)
        except (ValueError, OSError):
            if chosen.exists() or resolve(given) == chosen:
                raise
            logger.info(f"{chosen} was removed while it was read: taking the newest again.")


def _open(folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> tuple[Decoder, Config, Tokenizer]:
    others: tuple[str, ...] = ()
    if is_exported(folder):
        config, tokenizer, vocab_size = read_exported(folder)
        prefix = ""
    else:
        config, tokenizer, vocab_size = _read_checkpoint(folder)
        prefix, others = "model.", ("optimizer.",)
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{folder} gives a vocabulary of {vocab_size} to a tokenizer of {tokenizer.vocab_size} tokens."
        )

    def is_other(name: str) -> bool:
        return name.startswith(others)

    # All that follows takes memory and time by the settings, so that these are first held against the files.
    saved = saved_tensors(folder)
    start = f"{prefix}blocks."
    num_blocks = len({name.removeprefix(start).partition(".")[0] for name in saved if name.startswith(start)})
    if num_blocks != config.model.num_layers:
        raise ValueError(
            f"{folder} holds {num_blocks} blocks, but the settings give model.num_layers = {config.model.num_layers}: "
            "it is of another architecture."
        )
    if dtype is None:
        embedding = saved.get(f"{prefix}embedding.weight")
        floating = embedding is not None and embedding.properties.dtype.is_floating_point
        dtype = embedding.properties.dtype if embedding is not None and floating else torch.float32
    try:
        model = build_on_meta(config, vocab_size).to(dtype)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"The settings in {folder} give no model that can be built: {error}.") from error
    for module in model.modules():
        if getattr(module, "float32_island", False):
            module.to(torch.promote_types(dtype, torch.float32))
    check_tensors(model_state(model, prefix), saved, folder, is_other=is_other)
    model.to_empty(device=device)
    model.init_weights(0)  # for the buffers that are not saved
    load_tensors(model_state(model, prefix), folder, is_other=is_other)
    return model.eval(), config, tokenizer


def _read_checkpoint(folder: Path) -> tuple[Config, Tokenizer, int]:
    """Settings, tokenizer and vocabulary size of a checkpoint whose files are as they were written."""
    try:
        verify(folder)
        settings = read_toml(folder / "config.toml")
        _, fixed = read_run(folder)
    except ValueError as error:
        raise ValueError(f"{error}; give another checkpoint.") from error
    # Where the run wrote does not matter here, and is perhaps no path here.
    job = settings.pop("job", {})
    modules = job.get("custom_modules", []) if isinstance(job, dict) else []
    config = config_of_file(folder / "config.toml", {**settings, "job": {"custom_modules": modules}})
    tokenizer, vocab_size = Tokenizer(folder / "tokenizer.json", fixed["data.end_token"]), fixed["model.vocab_size"]
    for _, clause in differences(fixed, fixed_of_model(config, tokenizer, vocab_size), folder):
        raise ValueError(f"{folder / 'config.toml'} and run.json contradict each other: {clause}.")
    return config, tokenizer, vocab_size


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
