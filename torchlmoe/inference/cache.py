"""Holds the decoding states of many rows in one TensorDict, which can be reset, copied, forked, saved and loaded.

    cache = new_cache(model, num_rows=1, max_length=4096)
    logits = read(model, cache, prefix)                     # prefix int64 [1, T], any number of tokens
    save_cache(cache, "prefix.safetensors", model)
    cache = load_cache("prefix.safetensors", model, max_length=8192)
    many = cache[torch.zeros(8, dtype=torch.int64)]         # fork: an index tensor copies one row to eight
    reset_rows(many, [3])

`length` int64 [rows] is the number of tokens that each row has read; the other entries, one per block, come from
`Decoder.init_cache`. A slice of a cache shares its memory, so `cache[2:4]` can be decoded separately.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.files import open_regular, replacing
from torchlmoe.layers.sequence import MicrobatchShare, SequenceLayout
from torchlmoe.model.decoder import Decoder
from torchlmoe.model.spec import ModelSpec

PIECE = 512  # tokens read at once: bounds the activations and the attention mask of a long prompt
LENGTH = "length"
FORMAT = "torchlmoe cache 1"
SAMPLES = 256  # values per weight in a model's fingerprint


def new_cache(model: Decoder, num_rows: int, max_length: int, dtype: torch.dtype | None = None) -> TensorDict:
    """Returns a cache of empty rows, each for at most `max_length` tokens. dtype: see `Decoder.init_cache`."""
    cache = model.init_cache(num_rows, max_length, dtype)
    cache[LENGTH] = torch.zeros(num_rows, dtype=torch.int64, device=model.embedding.weight.device)
    return cache


def read(model: Decoder, cache: TensorDict, tokens: Tensor) -> Tensor:
    """Reads tokens int64 [rows, T] after those in `cache`, PIECE at a time, and returns the last logits [rows, V]."""
    for x in read_pieces(model, cache, tokens):
        last = x[:, -1:]
    return model.run_head(last)[:, 0]


def read_pieces(model: Decoder, cache: TensorDict, tokens: Tensor) -> Iterator[Tensor]:
    """Like `read`, but yields the input of the head, [rows, at most PIECE, dim], piece by piece."""
    for piece in tokens.split(PIECE, 1):
        positions = cache[LENGTH][:, None] + torch.arange(piece.shape[1], device=piece.device)
        sequence = SequenceLayout(positions, share=MicrobatchShare(loss_weight=0.0))
        x, _ = model.run_blocks(model.embed(piece), sequence, cache)
        cache[LENGTH].add_(piece.shape[1])
        yield x


def reset_rows(cache: TensorDict, rows: Sequence[int] | Tensor) -> None:
    """Empties rows in place."""
    index = torch.as_tensor(rows, dtype=torch.int64, device=cache[LENGTH].device)
    for tensor in cache.values(True, True):
        tensor[index] = 0


def copy_rows(
    source: TensorDict, source_rows: Sequence[int] | Tensor, target: TensorDict, target_rows: Sequence[int] | Tensor
) -> None:
    """Copies rows of one cache over rows of another or of the same, in place. A source row may occur several times.

    The caches may differ in `max_length`. Raises ValueError if a source row has more tokens than fit, or if the caches
    are of different models.
    """
    source_index, target_index = (
        torch.as_tensor(rows, dtype=torch.int64, device=cache[LENGTH].device)
        for rows, cache in ((source_rows, source), (target_rows, target))
    )
    if not len(source_index):
        return
    longest = int(source[LENGTH][source_index].max())
    for name, old in source.items(True, True):
        new = target[name]
        if old.shape[2:] != new.shape[2:]:
            raise ValueError(f"The caches differ in {'.'.join(_parts(name))}: they are of different models.")
        common = [min(sizes) for sizes in zip(old.shape[1:], new.shape[1:], strict=True)]
        if common != list(old.shape[1:]) and longest > common[0]:
            raise ValueError(f"A row of {longest} tokens does not fit into a cache of max_length = {common[0]}.")
        # Places after a row's tokens are overwritten before they are read.
        places: list[Any] = [slice(size) for size in common]
        new[(target_index, *places)] = old[(source_index, *places)].to(new)


def resized(cache: TensorDict, model: Decoder, max_length: int) -> TensorDict:
    """Returns a copy of all rows with another `max_length`. Raises ValueError if a row has more tokens."""
    rows, grown = range(len(cache)), growing(model)
    dtype = next((tensor.dtype for name, tensor in _flat(cache).items() if name in grown), None)
    other = new_cache(model, len(cache), max_length, dtype)
    copy_rows(cache, rows, other, rows)
    return other


def save_cache(cache: TensorDict, path: str | Path, model: Decoder) -> None:
    """Writes a cache of `model` as one safetensors file. Raises OSError if it cannot be written."""
    tensors, grown = _flat(cache), growing(model)
    longest = int(cache[LENGTH].max()) if len(cache) else 0
    for name, tensor in tensors.items():
        # Tensors that grow with the text are saved up to the longest row.
        tensors[name] = (tensor[:, :longest] if name in grown else tensor).cpu().contiguous()
    metadata = {"format": FORMAT, "model": _fingerprint(model), "sha256": _digest(tensors)}
    with replacing(Path(path), "The cache", "make room, or give another path") as partial:
        partial.write_bytes(save(tensors, metadata))


def load_cache(
    path: str | Path, model: Decoder, max_length: int | None = None, dtype: torch.dtype | None = None
) -> TensorDict:
    """Reads a cache that `save_cache` wrote, onto the model's device.

    max_length: at least the number of tokens of the longest row, which is the default. dtype: see `new_cache`.
    Raises ValueError, naming the file, if it is damaged or was saved with another model, shape or dtype.
    """
    try:
        with open_regular(Path(path)):
            pass
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}; save the cache again.") from None
    except ValueError as error:
        raise ValueError(f"{error}; give a file that save_cache wrote.") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} does not hold a cache of this version of torchlmoe; save the cache again.")
    if metadata.get("sha256") != _digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors do not have the checksum that was written; save it again.")
    if metadata.get("model") != _fingerprint(model):
        raise ValueError(
            f"{path} was saved with another model, or in another dtype of its weights; open that model, or read the "
            "text again."
        )
    lengths = tensors[LENGTH]
    longest = int(lengths.max()) if len(lengths) else 0
    cache = new_cache(model, len(lengths), longest if max_length is None else max_length, dtype)
    grown = growing(model)
    for name, tensor in _flat(cache).items():
        saved = tensors[name]
        if name in grown and longest > tensor.shape[1]:
            raise ValueError(f"{path} holds rows of {longest} tokens; max_length = {max_length} must be at least that.")
        place = tensor[:, :longest] if name in grown else tensor
        if saved.dtype != tensor.dtype or saved.shape != place.shape:
            actual, expected = (f"{list(x.shape)} of {x.dtype}" for x in (saved, place))
            raise ValueError(f"{path} holds {name} as {actual}, but needs {expected}; give the dtype it had.")
        place.copy_(saved)
    return cache


def growing(model: Decoder) -> set[str]:
    """Names of a cache's tensors that have a place per token, by comparison of caches for one and for two tokens."""
    meta = torch.device("meta")
    one, two = (_flat(model.init_cache(1, length, device=meta)) for length in (1, 2))
    return {name for name in one if one[name].shape != two[name].shape}


def _flat(cache: Any) -> dict[str, Tensor]:
    """Name -> tensor; complex tensors as pairs of real numbers, since safetensors has no complex128."""
    return {
        ".".join(_parts(name)): torch.view_as_real(tensor) if tensor.is_complex() else tensor
        for name, tensor in cache.items(True, True)
    }


def _parts(name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def _fingerprint(model: Decoder) -> str:
    """Identifies a model, its dtype and its training step by settings, shapes of weights, and some values of each."""
    digest = hashlib.sha256(repr(_settings(model.spec)).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        some = weight.flatten()[:: max(1, weight.numel() // SAMPLES)]
        digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _settings(spec: ModelSpec) -> list[Any]:
    """The settings of a model that change what it computes in evaluation, such as rope_base."""
    blocks = [replace(each, mixer_options=each.mixer_options | {"backend": None}) for each in spec.blocks]
    left_out = ("blocks", "loss", "loss_chunk_size")
    return [*blocks, *(getattr(spec, each.name) for each in fields(spec) if each.name not in left_out)]


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
