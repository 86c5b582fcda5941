"""Knows which tokens a model expects before a text, and how long texts may be, from the model's training.

torchlmoe trains with the end token before every document. Models of transformers expect the tokens that their tokenizer
adds, often none; a run that starts from such a model keeps its conventions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from torchlmoe.checkpoint.companions import CONFIG, FOLDER
from torchlmoe.checkpoint.open import resolve
from torchlmoe.checkpoint.transformers_folder import end_ids_of, is_transformers
from torchlmoe.config.settings import Config
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.files import expanded, read_json
from torchlmoe.interop.families import language_config

_JSON: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_UNLIMITED = 10**9  # transformers writes 10**30 for a tokenizer without a limit


@dataclass(frozen=True)
class Conventions:
    """The conventions of a model.

    before_context: token ids before every context.
    before_text: the token before a whole text, and before a context without other tokens.
    scores_beginning: whether `before_context` is scored as part of a whole text. lm-eval's wrapper of transformers does
        so with the tokens that a tokenizer adds.
    max_length: number of tokens of the sequences that the model was trained on.
    end_ids: the tokens that end a continuation.
    """

    before_context: tuple[int, ...]
    before_text: int
    scores_beginning: bool
    max_length: int
    end_ids: tuple[int, ...]


def conventions_of(
    folder: str | Path, config: Config, tokenizer: Tokenizer, begin_with_end: bool | None = None
) -> Conventions:
    """Returns the conventions of a model, from the folder, settings and tokenizer of `open_model`.

    begin_with_end: whether the end token precedes every context; None for the model's own convention.
    Raises ValueError for files of the tokenizer that cannot be read.
    """
    origin = _transformers_folder(resolve(Path(expanded(str(folder)))))
    before_context: tuple[int, ...] = (tokenizer.end_id,)
    end_ids: tuple[int, ...] = (tokenizer.end_id,)
    before_text, max_length = tokenizer.end_id, config.training.seq_len
    if origin is not None:
        before_context, before_text = tokenizer.added_before(), _before_text(origin, tokenizer)
        content = language_config(read_json(origin / CONFIG, _JSON))
        max_length = _max_length(content, _optional(origin / "tokenizer_config.json"))
        end_ids = tuple(dict.fromkeys((*end_ids, *end_ids_of(origin, content))))
    if begin_with_end is not None:
        before_context = (tokenizer.end_id,) * begin_with_end
    scores_beginning = origin is not None and begin_with_end is None
    return Conventions(before_context, before_text, scores_beginning, max_length, end_ids)


def _transformers_folder(folder: Path) -> Path | None:
    """The transformers folder of a model: the folder itself, or the one that its run was imported from."""
    places = (folder, folder.parent.parent / FOLDER)
    return next((place for place in places if is_transformers(place)), None)


def _max_length(content: dict[str, Any], tokenizer: dict[str, Any]) -> int:
    """The maximum length in a config.json, else in the tokenizer's settings, else 2048, as in lm-eval's wrapper."""
    given = [content.get(name) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    lengths = [length for length in (*given, tokenizer.get("model_max_length")) if isinstance(length, int)]
    return next((length for length in lengths if 0 < length < _UNLIMITED), 2048)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, _JSON) if path.is_file() else {}


def _before_text(folder: Path, tokenizer: Tokenizer) -> int:
    """The begin token in the tokenizer's settings; without it their end token, or else `tokenizer.end_id`."""
    tables = [_optional(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    for key in ("bos_token", "eos_token"):
        for table in tables:
            token = table.get(key)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and (index := tokenizer.id_of(text)) is not None:
                return index
    return tokenizer.end_id
