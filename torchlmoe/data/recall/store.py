"""A recall task as training or validation data: `data.dataset = "recall:mqar"`.

Nothing is stored: a document is drawn when it is read, from the seed and its number.
"""

import hashlib
import json
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from torchlmoe.data.recall.tasks import END, TASKS, Document
from torchlmoe.data.store import StoreIndex, TokenStore
from torchlmoe.options import keyword_settings

PREFIX = "recall:"
FORMAT = 1  # increase it if a change gives other documents for the same options
DOCUMENTS_KEPT = 4096
SPLITS = ("train", "validation", "test")


class RecallStore(TokenStore):
    """Documents of one task, each of `length` tokens.

    task: a name in `TASKS`. split: "train", "validation" or "test"; their documents differ.
    num_documents, validation_documents: number of documents in the training split, and in each other split.
    options: options of the task.
    Document n depends only on (seed, split, n). `text_bytes` is 0, since the tokens do not represent text.
    Raises ValueError for options that contradict each other.
    """

    is_text = False

    def __init__(
        self,
        task: str,
        split: str,
        *,
        num_documents: Annotated[
            int, Field(ge=1, le=2**32, description="Documents in an epoch; each is drawn when it is read.")
        ] = 1_000_000,
        validation_documents: Annotated[int, Field(ge=1, le=2**32, description="Documents to validate on.")] = 512,
        seed: Annotated[int, Field(ge=0, lt=2**63, description="All documents are drawn from it.")] = 0,
        **options: Any,
    ):
        defaults = {name: default for name, (_, default) in keyword_settings(TASKS[task]).items()}
        self.task, self.split, self.seed = task, split, seed
        self.options = defaults | options
        self.length = int(self.options["length"])
        size = num_documents if split == "train" else validation_documents
        recipe = {"format": FORMAT, "task": task, "split": split, "seed": seed, "size": size, "options": self.options}
        self.index = StoreIndex(
            recipe=recipe,
            vocab_size=int(self.options["vocab_size"]),
            end_id=END,
            num_tokens=size * self.length,
            num_documents=size,
            text_bytes=0,
            has_token_bytes=False,
            content=hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        )
        self.num_tokens, self.num_documents = self.index.num_tokens, size
        self.vocab_size, self.end_id, self.text_bytes = self.index.vocab_size, END, 0
        self.token_bytes = None
        self.document = lru_cache(DOCUMENTS_KEPT)(self._draw)
        self.document(0)  # raises an error now if options contradict each other

    def _draw(self, number: int) -> Document:
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), number))
        return TASKS[self.task](rng, **self.options)

    @property
    def document_starts(self) -> np.ndarray:
        return np.arange(self.num_documents + 1, dtype=np.int64) * self.length

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self._part("tokens", start, stop)

    def own_labels(self, start: int, stop: int) -> np.ndarray:
        return self._part("labels", start, stop)

    def _part(self, name: str, start: int, stop: int) -> np.ndarray:
        stop = min(stop, self.num_tokens)
        if stop <= start:
            return np.empty(0, dtype=np.int64)
        first, last = start // self.length, -(-stop // self.length)
        parts = [getattr(self.document(number), name) for number in range(first, last)]
        return np.concatenate(parts)[start - first * self.length : stop - first * self.length]


def recall_task(dataset: str) -> str | None:
    """Returns the task of a data.dataset, or None if it is not a recall task. Raises ValueError for an unknown task."""
    if not dataset.startswith(PREFIX):
        return None
    task = dataset.removeprefix(PREFIX)
    if task not in TASKS:
        raise ValueError(f"there is no recall task {task!r}; choose one of {', '.join(TASKS)}")
    return task


def recall_settings(task: str) -> dict[str, tuple[Any, Any]]:
    """Returns the options of a task in data.reader_options: name -> (annotation, default)."""
    return {**keyword_settings(RecallStore.__init__), **keyword_settings(TASKS[task])}
