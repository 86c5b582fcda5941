"""Reads the keys of a config.json one by one, and raises an error for keys whose meaning would be lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Keys that do not change the outputs of a model: names, ids, initial values, options of transformers.
WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _experts_implementation _name_or_path architectures attn_implementation auto_map
    bos_token_id chunk_size_feed_forward decoder_start_token_id dtype eos_token_id id2label initializer_range
    is_encoder_decoder label2id max_position_embeddings model_type output_attentions output_hidden_states
    output_router_logits pad_token_id problem_type rescale_prenorm_residual return_dict sep_token_id
    tokenizer_class torch_dtype transformers_version use_cache use_return_dict
    """.split()
)
_REQUIRED: Any = object()


class Keys:
    """The keys of a config.json. Every method but `finish` marks its keys as read, and `finish` checks that all were.

    content: the parsed file. place: its path, for messages.
    Every method raises ValueError with one sentence that names the key.
    """

    def __init__(self, content: Mapping[str, Any], place: str):
        self.content, self.place = content, place
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = _REQUIRED, kind: type | tuple[type, ...] = object) -> Any:
        """Return the value of a key, or the default if the key is absent or null. kind: type of the value."""
        self._taken.add(name)
        value = self.content.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.place} has no {name}: it must say this.")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            expected = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{self.place} has {name} = {_short(value)}, which must be of type {expected}.")
        return value

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        value = self.take(name, default, int)
        if value is not default and value < least:
            raise ValueError(f"{self.place} has {name} = {value}, which must be at least {least}.")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.take(name, default, (int, float))
        return float(value) if isinstance(value, int) else value

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        return self.take(name, default, bool)

    def table(self, name: str) -> dict[str, Any]:
        """Return an object as a dict, which is empty if the key is absent."""
        return dict(self.take(name, {}, dict))

    def choices(self, name: str, length: int, known: Mapping[str, str], default: Sequence[str]) -> list[str]:
        """Return a list of `length` words, translated by `known`. default: the words if the key is absent."""
        words = self.take(name, list(default), list)
        for word in words:
            if word not in known:
                raise ValueError(
                    f"{self.place} has {_short(word)} among its {name}, which has no counterpart in torchlmoe; "
                    f"supported are {', '.join(known)}."
                )
        if len(words) != length:
            raise ValueError(f"{self.place} has {len(words)} {name} for {length} layers.")
        return [known[word] for word in words]

    def only(self, name: str, *values: Any) -> None:
        """Check that a key is absent, null or one of the values. Other values have no counterpart in torchlmoe."""
        self._taken.add(name)
        value = self.content.get(name)
        if value is not None and value not in values:
            supported = ", ".join(map(_short, values))
            raise ValueError(
                f"{self.place} has {name} = {_short(value)}, an option without a counterpart in torchlmoe; "
                f"supported: {supported}."
            )

    def skip(self, *names: str) -> None:
        """Mark keys as read that have no effect in a model of this family."""
        self._taken.update(names)

    def finish(self) -> None:
        """Check that every key was read, except keys that are off: null, false, zero or empty."""
        for name, value in self.content.items():
            if value and name not in self._taken and name not in WITHOUT_EFFECT:
                raise ValueError(
                    f"{self.place} has {name} = {_short(value)}, an option without a counterpart in torchlmoe: "
                    "a model that needs it cannot be imported."
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."
