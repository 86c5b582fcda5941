"""Opens a trained model, from a checkpoint of a run or from an exported folder."""

import logging
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from torchlmoe.checkpoint.companions import read_companions
from torchlmoe.checkpoint.exported import config_of_file, is_exported, read_exported
from torchlmoe.checkpoint.folders import is_published, published
from torchlmoe.checkpoint.manifest import NAME, verify
from torchlmoe.checkpoint.run_record import differences, fixed_of_model, read_run
from torchlmoe.checkpoint.state import check_tensors, load_tensors, model_state, saved_tensors
from torchlmoe.checkpoint.tensor_files import TensorFolder
from torchlmoe.checkpoint.transformers_folder import TransformersFolder, is_transformers
from torchlmoe.config.settings import Config
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.files import expanded, read_toml
from torchlmoe.model.decoder import Decoder, build_on_meta

logger = logging.getLogger(__name__)


def open_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Decoder, Config, Tokenizer]:
    """Opens a whole model on one device, in evaluation mode, with the settings and the tokenizer of its training.

    folder: a checkpoint (step-...), the folder of a run or of its checkpoints (the latest one is opened), an export of
        torchlmoe, or a folder of transformers' save_pretrained of a family in `interop.families`.
    dtype: of the parameters; as saved if None. Modules marked `float32_island` stay in at least float32.
    A run that saves and prunes may remove a checkpoint while it is read. Then the newest one is read instead.
    Raises ValueError, naming the file, if something is missing or damaged.
    """
    try:
        path = Path(expanded(str(folder)))
    except ValueError as error:
        raise ValueError(f"The folder {str(folder)!r} is not valid: it {error}.") from None
    while True:
        chosen = resolve(path)
        try:
            return _open(chosen, dtype, device)
        except (ValueError, OSError):
            if chosen.exists() or resolve(path) == chosen:
                raise
            logger.info(f"{chosen} was removed while it was read: opening the newest checkpoint again.")


def open_folder(folder: Path) -> "SavedFolder | TransformersFolder":
    """Opens a folder like `open_model`, but without the weights. Raises the same errors."""
    chosen = resolve(folder)
    return TransformersFolder(chosen) if is_transformers(chosen) else SavedFolder(chosen)


def _open(folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> tuple[Decoder, Config, Tokenizer]:
    opened = open_folder(folder)
    model = opened.model.to(opened.dtype if dtype is None else dtype)
    for module in model.modules():
        if getattr(module, "float32_island", False):
            module.to(torch.promote_types(opened.dtype if dtype is None else dtype, torch.float32))
    opened.check()
    model.to_empty(device=device)
    model.init_weights(0)  # sets the buffers that are not saved
    opened.load()
    return model.eval(), opened.config, opened.tokenizer


class SavedFolder:
    """A checkpoint or an export, opened without its weights.

    Attributes: config, tokenizer, vocab_size; dtype, of the embedding; model, on the meta device.
    Raises ValueError with one sentence if something is missing, damaged, or contradicts itself.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if is_exported(folder):
            self.config, self.tokenizer, self.vocab_size = read_exported(folder)
            self.prefix = ""
        else:
            self.config, self.tokenizer, self.vocab_size = _read_checkpoint(folder)
            self.prefix = "model."
        if self.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"{folder} gives a vocabulary of {self.vocab_size} to a tokenizer of {self.tokenizer.vocab_size} "
                "tokens."
            )
        # Building the model takes time and memory, so the settings are first compared with the files.
        self._saved = saved_tensors(folder)
        start = f"{self.prefix}blocks."
        num_blocks = len({name.removeprefix(start).partition(".")[0] for name in self._saved if name.startswith(start)})
        if num_blocks != self.config.model.num_layers:
            raise ValueError(
                f"{folder} holds {num_blocks} blocks, but the settings give model.num_layers = "
                f"{self.config.model.num_layers}: it belongs to another architecture."
            )
        embedding = self._saved.get(f"{self.prefix}embedding.weight")
        floating = embedding is not None and embedding.properties.dtype.is_floating_point
        self.dtype = embedding.properties.dtype if embedding is not None and floating else torch.float32
        try:
            self.model = build_on_meta(self.config, self.vocab_size)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"The model of the settings in {folder} cannot be built: {error}.") from error

    def check(self) -> None:
        """Raises ValueError for a tensor that is missing, superfluous, or of another shape than the model's."""
        check_tensors(model_state(self.model, self.prefix), self._saved, self.folder, is_other=self._is_other)

    def load(self) -> None:
        """Fill the model, which must have storage."""
        load_tensors(model_state(self.model, self.prefix), self.folder, is_other=self._is_other)

    def _is_other(self, name: str) -> bool:
        return bool(self.prefix) and name.startswith("optimizer.")

    @cached_property
    def _source(self) -> TensorFolder:
        return TensorFolder(self.folder)

    def meta(self) -> dict[str, Tensor]:
        """The saved tensors on the meta device: name in the model -> tensor."""
        return {name: self._source.meta([f"{self.prefix}{name}"])[0] for name in self.model.state_dict()}

    @property
    def sizes(self) -> dict[str, int]:
        """Name in the model -> bytes of the saved tensor."""
        return {name: tensor.nbytes for name, tensor in self.meta().items()}

    def read(self, names: Iterable[str]) -> list[Tensor]:
        """Read tensors, given by their names in the model."""
        return self._source.read(f"{self.prefix}{name}" for name in names)

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """Yield all tensors, one at a time."""
        return ({name: self.read([name])[0]} for name in self.model.state_dict())

    def companions(self) -> dict[str, bytes]:
        """The files beside the weights of an imported model: name -> content."""
        return {"tokenizer.json": self.tokenizer.content, **read_companions(self.folder.parent.parent)}


def _read_checkpoint(folder: Path) -> tuple[Config, Tokenizer, int]:
    """Returns settings, tokenizer and vocabulary size of a checkpoint. Raises ValueError if its files have changed."""
    try:
        verify(folder)
        settings = read_toml(folder / "config.toml")
        _, fixed = read_run(folder)
    except ValueError as error:
        raise ValueError(f"{error}; give another checkpoint.") from error
    # The run's own folder does not matter, and its path may not be valid on this machine.
    job = settings.pop("job", {})
    modules = job.get("custom_modules", []) if isinstance(job, dict) else []
    config = config_of_file(folder / "config.toml", {**settings, "job": {"custom_modules": modules}})
    tokenizer, vocab_size = Tokenizer(folder / "tokenizer.json", fixed["data.end_token"]), fixed["model.vocab_size"]
    for _, clause in differences(fixed, fixed_of_model(config, tokenizer, vocab_size), folder):
        raise ValueError(f"{folder / 'config.toml'} and run.json contradict each other: {clause}.")
    return config, tokenizer, vocab_size


def resolve(folder: Path) -> Path:
    """Returns the checkpoint, export or transformers folder that a path names. Raises ValueError if there is none."""
    if (folder / NAME).is_file() or is_published(folder) or is_exported(folder) or is_transformers(folder):
        return folder
    for root in (folder, folder / "checkpoints"):
        if available := published(root):
            return available[max(available)]
    raise ValueError(
        f"{folder} holds no checkpoint: give a folder step-..., the job.dump_folder of a run that saved one, or a "
        "folder that torchlmoe.export wrote."
    )
