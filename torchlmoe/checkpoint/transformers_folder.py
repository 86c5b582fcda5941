"""Opens a folder of transformers as a model of torchlmoe: settings, tokenizer, and weights, a few at a time."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from torchlmoe.checkpoint.companions import CONFIG, GENERATION, find_companions
from torchlmoe.checkpoint.tensor_files import TensorFolder, files_of_index
from torchlmoe.config.load import ConfigError, config_from
from torchlmoe.config.settings import Config
from torchlmoe.data.tokenizer import Tokenizer, number_tokenizer, token_of_id
from torchlmoe.files import read_json
from torchlmoe.interop.families import FAMILIES, MULTIMODAL, language_config
from torchlmoe.interop.family import Family
from torchlmoe.interop.rules import Conversion, conversions
from torchlmoe.model.decoder import build_on_meta

logger = logging.getLogger(__name__)
_JSON: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def is_transformers(folder: Path) -> bool:
    """Whether the folder's config.json names a model_type other than torchlmoe's."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        return read_json(folder / CONFIG, _JSON).get("model_type", "torchlmoe") != "torchlmoe"
    except ValueError:
        return False


class TransformersFolder:
    """A folder of transformers, opened without its weights: only headers are read.

    Attributes: config, tokenizer, vocab_size; dtype, of most elements; model, torchlmoe's on the meta device;
    conversions, from the folder's tensors to the model's; sizes, name -> bytes of the model's tensors.
    Raises ValueError with one sentence for a folder that is damaged, of an unknown family, or has an option or a tensor
    without a counterpart in torchlmoe.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        content = language_config(read_json(folder / CONFIG, _JSON))
        self.family = family_of(content, folder / CONFIG)
        tables = self.family.settings(content, str(folder / CONFIG))
        self._source = TensorFolder(folder, files_of_index(folder))
        self.vocab_size = content["vocab_size"]
        self.tokenizer = _tokenizer(folder, content, self.vocab_size)
        self.dtype = most_common_dtype(self._source, self._source.pieces)
        half = self.dtype in (torch.float16, torch.bfloat16)
        training = {"dtype": "bfloat16" if half else str(self.dtype).removeprefix("torch.")}
        tables |= {"training": training, "data": {"end_token": self.tokenizer.end_token}}
        try:
            self.config: Config = config_from([tables])
        except ConfigError as error:
            raise ValueError(f"{folder / CONFIG} cannot be used: {error}") from error
        self.model = build_on_meta(self.config, self.vocab_size)
        self.conversions = self._conversions()
        self.sizes = self._checked_sizes()
        self._check_tied()

    def _conversions(self) -> list[Conversion]:
        names, family = self._source.pieces, self.family
        used = family.places(self.model, names)
        if len(used) < len(names):
            others = [name for name in names if name not in set(used)]
            logger.info(f"Left out: {len(others)} tensors that have no place in the model, such as {others[0]}.")
        try:
            return conversions(used, family.rules_of_files(self.model, used))
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    def _checked_sizes(self) -> dict[str, int]:
        """Check all shapes, and return the bytes of each of the model's tensors, in the order of the conversions."""
        sizes: dict[str, int] = {}
        expected = self.model.state_dict()
        for conversion in self.conversions:
            try:
                converted = conversion(self._source.meta(conversion.sources))
            except ValueError as error:
                raise ValueError(f"{self.folder}: {error}") from error
            for name, tensor in converted.items():
                if name not in expected or tensor.shape != expected[name].shape:
                    shape = list(expected[name].shape) if name in expected else "none"
                    raise ValueError(
                        f"{self.folder}: {conversion.sources[0]} gives a {name} of shape {list(tensor.shape)}, but "
                        f"{CONFIG} asks for {shape}: they belong to different models."
                    )
                sizes[name] = tensor.numel() * tensor.element_size()
        for name in expected:
            if name not in sizes:
                raise ValueError(f"{self.folder} has no tensor for {name}, which {CONFIG} asks for: it is incomplete.")
        return sizes

    def _check_tied(self) -> None:
        """Check tied embeddings: files may have the weight twice, and transformers does not tie weights that differ."""
        head = self.family.names.head
        if self.model.head.projection is not None or head not in self._source.pieces:
            return
        (embedding,) = next(each.sources for each in self.conversions if each.targets == ("embedding.weight",))
        if not torch.equal(*self._source.read([head, embedding])):
            raise ValueError(
                f"{self.folder} has a {head} that differs from {embedding}, but {CONFIG} says that they "
                "are tied: set tie_word_embeddings = false there."
            )

    def check(self) -> None:
        """Do nothing: all checks are done when the folder is opened."""

    @torch.no_grad()
    def load(self) -> None:
        """Fill the model, which must have storage."""
        state = self.model.state_dict()
        for tensors in self.tensors():
            for name, tensor in tensors.items():
                state[name].copy_(tensor)

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """Yield tensors by torchlmoe's names, a few at a time."""
        for conversion in self.conversions:
            yield conversion(self._source.read(conversion.sources))

    def companions(self) -> dict[str, bytes]:
        """The files beside the weights: name -> content."""
        return {"tokenizer.json": self.tokenizer.content, **find_companions(self.folder)}


def family_of(content: dict[str, Any], place: Path) -> Family:
    """Returns the family of a config.json. Raises ValueError if it is not supported. place: names it in the message."""
    kind = content.get("model_type")
    if kind not in [*FAMILIES]:
        supported = ", ".join(sorted([*FAMILIES, *MULTIMODAL]))
        raise ValueError(f"{place} has model_type = {kind!r}, which cannot be imported; supported are {supported}.")
    return FAMILIES[kind]


def end_ids_of(folder: Path, content: dict[str, Any]) -> tuple[int, ...]:
    """Returns the tokens that end a text, often one, in generation_config.json or else config.json; may be none."""
    generation = read_json(folder / GENERATION, _JSON) if (folder / GENERATION).is_file() else {}
    ids = next((each["eos_token_id"] for each in (generation, content) if each.get("eos_token_id") is not None), ())
    return tuple(index for index in (ids if isinstance(ids, (list, tuple)) else [ids]) if isinstance(index, int))


def _tokenizer(folder: Path, content: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The folder's tokenizer with the end token of its settings; without a tokenizer.json, one that reads token ids."""
    end_id = next(iter(end_ids_of(folder, content)), None)
    if not (folder / "tokenizer.json").is_file():
        if (folder / "tokenizer.model").is_file():
            raise ValueError(
                f"{folder} has tokenizer.model but no tokenizer.json: save the tokenizer again with transformers' "
                "AutoTokenizer."
            )
        logger.warning(f"{folder} has no tokenizer.json: write texts as token ids, such as '17 3 256'.")
        return number_tokenizer(vocab_size, vocab_size - 1 if end_id is None else end_id)
    path = folder / "tokenizer.json"
    return Tokenizer(path, None if end_id is None else token_of_id(path, end_id))


def most_common_dtype(tensors: TensorFolder, names: Iterable[str]) -> torch.dtype:
    """Returns the dtype that most elements of the named tensors have."""
    counts: Counter[torch.dtype] = Counter()
    for name in names:
        counts[tensors.pieces[name][0].dtype] += math.prod(tensors.shape(name))
    return counts.most_common(1)[0][0]
