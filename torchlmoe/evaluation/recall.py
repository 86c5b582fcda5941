"""Evaluates models on the tasks of data/recall, by number of pairs, length and depth."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from torchlmoe.config.recall import recall_data
from torchlmoe.config.settings import Data
from torchlmoe.data.recall.store import RecallStore
from torchlmoe.data.recall.tasks import END, TASKS, Document
from torchlmoe.inference.generate import generate
from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.model.decoder import Decoder
from torchlmoe.options import keyword_settings

# Task -> the options of each point at which it is evaluated.
RECALL: dict[str, tuple[dict[str, Any], ...]] = {
    "mqar": tuple(
        {"num_pairs": pairs, "length": length} for pairs, length in ((4, 64), (8, 64), (16, 128), (32, 256), (64, 512))
    ),
    "selective_copying": tuple({"num_symbols": number, "length": 16 * number} for number in (4, 8, 16)),
    "needle": tuple({"length": length, "depth": depth} for length in (64, 128, 256) for depth in (0.0, 0.5, 1.0)),
    "phonebook": tuple({"num_entries": number, "length": 8 * (number + 2)} for number in (4, 8, 16, 32)),
    "parity": tuple({"length": length} for length in (32, 64, 128, 256)),
    "s3": tuple({"length": length} for length in (16, 32, 64, 128)),
    "s5": tuple({"length": length} for length in (16, 32, 64, 128)),
}
By = Literal["likelihood", "generation"]
NUM_DOCUMENTS = 128  # at each point


@torch.no_grad()
def evaluate_recall(
    model: Decoder,
    names: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    points: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    by: By = "likelihood",
    num_documents: int = NUM_DOCUMENTS,
    batch_size: int = 16,
    seed: int = 0,
    end_id: int = END,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures the accuracy of each task at each of its points. The result is JSON.

    model: put into evaluation mode.
    names: tasks, keys of RECALL.
    options: task -> options for all of its points, as in data.reader_options. vocab_size is by default the smaller of
        the task's default and the model's number of tokens.
    points: task -> options of each point, in place of RECALL's. Points of RECALL that do not fit the options are left
        out, such as 64 pairs if the vocabulary has 30 keys.
    by: "likelihood" takes the likeliest token at each label, given the tokens before it. "generation" continues the
        tokens before each document's last question greedily; both agree for answers of one token.
    num_documents: number per point, from a split that is used neither for training nor for validation. seed: of it.
    end_id: the model's end token, swapped with the task's.
    progress: called with a line before each point.

    Returns for each name `by`, `points`, and the means over points of `token_accuracy` (answer tokens) and
    `exact_match` (questions with no wrong token). Each point has both with standard errors (`_se`, of the mean over
    documents), `num_documents`, `num_questions`, `num_tokens`, `last_exact_match` (of each document's last question)
    and, by likelihood, `nll` in nats per answer token. `left_out` lists the options of omitted points with a `reason`.
    Raises ValueError for an unknown name, for options that do not fit one of `points`, and if no point of RECALL fits.
    """
    if by not in get_args(By):
        raise ValueError(f"by = {by!r} must be one of {', '.join(get_args(By))}.")
    check_names(names)
    if num_documents < 1 or batch_size < 1:
        raise ValueError(f"num_documents = {num_documents} and batch_size = {batch_size} must be at least 1.")
    model.eval()
    results: dict[str, dict[str, Any]] = {}
    stores: dict[str, list[tuple[dict[str, Any], RecallStore]]] = {}
    left_out: dict[str, list[dict[str, Any]]] = {}
    for name in names:  # before any evaluation, so that options that do not fit raise immediately
        stores[name], left_out[name] = [], []
        for point in map(dict, (points or RECALL).get(name, RECALL[name])):
            merged = {"vocab_size": _vocab_size(model, name), **(options or {}).get(name, {}), **point}
            # The size of the training split does not concern the test split.
            merged.pop("num_documents", None)
            try:
                store = RecallStore(name, "test", **{**merged, "validation_documents": num_documents, "seed": seed})
                _check_vocabulary(model, store)
            except ValueError as error:
                if name in (points or {}):
                    raise
                left_out[name].append({"options": point, "reason": str(error)})
            else:
                stores[name].append((point, store))
        if not stores[name]:
            raise ValueError(left_out[name][0]["reason"])
    for name in names:
        figures = []
        for point, store in stores[name]:
            if progress is not None:
                progress(f"{name}: {', '.join(f'{key} {value}' for key, value in point.items())}")
            documents = [_with_end(store.document(number), end_id) for number in range(num_documents)]
            ask = _by_likelihood if by == "likelihood" else _by_generation
            figures.append({"options": point} | ask(model, documents, batch_size))
        means = {key: float(np.mean([point[key] for point in figures])) for key in ("token_accuracy", "exact_match")}
        results[name] = {"by": by, **means, "points": figures, "left_out": left_out[name]}
    return results


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in RECALL."""
    for name in names:
        if name not in RECALL:
            raise ValueError(f"There is no recall task {name!r}; choose from {', '.join(RECALL)}.")


def trained_options(data: Data) -> dict[str, dict[str, Any]]:
    """The options for `evaluate_recall` of a model that was trained with the settings `data`.

    They are the reader options of its recall tasks, except for the least number of pairs or entries: a document of a
    point has as many as the point says. A point's own options take precedence.
    """
    options: dict[str, dict[str, Any]] = {}
    for task, given, _ in recall_data(data):
        if task is not None and task not in options:
            options[task] = {name: value for name, value in given.items() if not name.startswith("min_")}
    return options


def _by_likelihood(model: Decoder, documents: list[Document], batch_size: int) -> dict[str, Any]:
    device = model.embedding.weight.device
    right, nll, num_tokens = [], 0.0, 0
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        tokens = torch.from_numpy(np.stack([document.tokens for document in batch])).to(device)
        labels = torch.from_numpy(np.stack([document.labels for document in batch])).to(device)
        is_answer = labels != IGNORE_INDEX
        logits = model(tokens)[is_answer]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll += torch.nn.functional.cross_entropy(logits, labels[is_answer], reduction="sum").item()
        hits = torch.zeros_like(is_answer)
        hits[is_answer] = logits.argmax(-1) == labels[is_answer]
        num_tokens += int(is_answer.sum())
        right += [
            _by_question(row, document.questions) for row, document in zip(hits.cpu().numpy(), batch, strict=True)
        ]
    return _figures(right) | {"nll": nll / num_tokens}


def _by_generation(model: Decoder, documents: list[Document], batch_size: int) -> dict[str, Any]:
    right = []
    for first in range(0, len(documents), batch_size):
        prompts, answers = [], []
        for document in documents[first : first + batch_size]:
            last = np.flatnonzero(document.questions == document.questions.max())
            prompts.append(document.tokens[: last[0] + 1].tolist())
            answers.append(document.labels[last])
        length = max(map(len, answers))
        written = generate(model, prompts, max_new_tokens=length)
        right += [[np.array(row[: len(answer)]) == answer] for row, answer in zip(written, answers, strict=True)]
    return _figures(right)


def _by_question(hits: np.ndarray, questions: np.ndarray) -> list[np.ndarray]:
    return [hits[questions == number] for number in range(questions.max() + 1)]


def _figures(right: list[list[np.ndarray]]) -> dict[str, Any]:
    """Accuracies with standard errors. right: by document and question, whether each token of the answer is right."""
    tokens = [np.concatenate(document) for document in right]
    exact = [np.array([question.all() for question in document]) for document in right]
    figures: dict[str, Any] = {
        "num_documents": len(right),
        "num_questions": sum(map(len, exact)),
        "num_tokens": sum(map(len, tokens)),
    }
    for key, values in (("token_accuracy", tokens), ("exact_match", exact)):
        # Answers within a document depend on each other, so errors are computed over documents.
        means = np.array([document.mean() for document in values])
        figures[key] = float(np.concatenate(values).mean())
        figures[f"{key}_se"] = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    return figures | {"last_exact_match": float(np.mean([document[-1] for document in exact]))}


def _vocab_size(model: Decoder, name: str) -> int:
    return min(keyword_settings(TASKS[name])["vocab_size"][1], model.embedding.num_embeddings)


def _check_vocabulary(model: Decoder, store: RecallStore) -> None:
    if store.vocab_size > model.embedding.num_embeddings:
        raise ValueError(
            f"vocab_size = {store.vocab_size} of recall task {store.task!r} is more than the model's "
            f"{model.embedding.num_embeddings} tokens; give a smaller one."
        )


def _with_end(document: Document, end_id: int) -> Document:
    """The document with the ids `end_id` and END swapped."""
    if end_id == END:
        return document
    tokens, labels = (
        np.where(ids == END, end_id, np.where(ids == end_id, END, ids)) for ids in (document.tokens, document.labels)
    )
    return document._replace(tokens=tokens, labels=labels)
