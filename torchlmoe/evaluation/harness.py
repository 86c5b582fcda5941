"""Adapts a model to the interface of lm-eval (lm-evaluation-harness), and runs its tasks.

Requests are cut and scored as in lm-eval's own wrapper of transformers (`HFLM`), so equal weights get equal scores.
Only the tokens before a context differ: they depend on the model's training (`checkpoint/conventions.py`). Spaces at
the end of a context belong to the continuation. Text longer than `max_length` loses tokens on the left. A whole text is
scored in windows of `max_length` tokens.
"""

import json
import logging
from collections.abc import Sequence
from math import fsum
from typing import Any

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from torchlmoe.checkpoint.conventions import Conventions
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.evaluation.scores import TOKENS_AT_ONCE, Request, score
from torchlmoe.inference.sampling import Sampling
from torchlmoe.inference.text_stream import Row, continue_rows
from torchlmoe.model.decoder import Decoder

logger = logging.getLogger(__name__)
MAX_NEW_TOKENS = 256  # if a task sets no limit
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty")  # of `generation_kwargs`


class HarnessModel(TemplateLM):
    """A model with lm-eval's interface.

    model: in evaluation mode. conventions: the tokens before a context or text, and the maximum length of both.
    tokens_at_once: tokens per forward when scoring. rows_at_once: rows generated together. seed: of sampling.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        conventions: Conventions,
        tokens_at_once: int = TOKENS_AT_ONCE,
        rows_at_once: int = 16,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.text_tokenizer, self.conventions = model, tokenizer, conventions
        self.max_length = conventions.max_length
        self.tokens_at_once, self.rows_at_once, self.seed = tokens_at_once, rows_at_once, seed
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        return self.conventions.before_text

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids of a string. The tokens before every context precede them unless add_special_tokens is False."""
        before = () if add_special_tokens is False else self.conventions.before_context
        return [*before, *self.text_tokenizer.encode_batch([string])[0]]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole strings, each given the token that precedes a text; a float per request."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=self.conventions.scores_beginning)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append(Request(tuple(context), tuple(continuation)))
                owners.append(owner)
        parts: list[list[float]] = [[] for _ in requests]
        for owner, (log_likelihood, _) in zip(owners, self._score(windows, "texts", disable_tqdm), strict=True):
            parts[owner].append(log_likelihood)
        sums = list(map(fsum, parts))
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each (context, continuation), and whether it is greedy; (0, True) if both are empty."""
        whole = [request for request in requests if any(request.args)]  # lm-eval fails on the others
        answers = iter(super().loglikelihood(whole, disable_tqdm))
        return [next(answers) if any(request.args) else (0.0, True) for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        cut = []
        for _, context, continuation in requests:
            # The model does not read the last token.
            room = max(1, self.max_length + 1 - len(continuation))
            cut.append(Request(tuple(context[-room:]), tuple(continuation)))
        num_cut = sum(len(whole[1]) > len(request.context) for whole, request in zip(requests, cut, strict=True))
        if num_cut:
            logger.warning(f"{num_cut} of {len(cut)} requests have more than {self.max_length} tokens and are cut.")
        answers = self._score(cut, "log-likelihoods", disable_tqdm)
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _score(self, requests: list[Request], title: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc=title, disable=disable_tqdm or None) as bar:
            scores = score(self.model, requests, tokens_at_once=self.tokens_at_once, done=bar.update)
        return [(entry.log_likelihood, entry.is_greedy) for entry in scores]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, the end token or `max_gen_toks` tokens; a text per request.

        Requests with equal arguments are generated together. Raises ValueError for arguments that are not supported,
        and if `max_gen_toks` leaves no room for a prompt.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generations", disable=disable_tqdm or None) as bar:
            for group in groups.values():
                arguments = requests[group[0]].args[1]
                stop, max_new_tokens, sampling = _generation(arguments)
                if max_new_tokens >= self.max_length:
                    raise ValueError(
                        f"A task generates up to {max_new_tokens} tokens, which leaves no room for a prompt within "
                        f"max_length = {self.max_length}; give a larger --max-length."
                    )
                room = self.max_length - max_new_tokens
                prompts = {
                    index: (self.tok_encode(requests[index].args[0]) or [self.prefix_token_id])[-room:]
                    for index in group
                }
                # The longest first, so that a lack of memory appears at the start.
                order = sorted(group, key=lambda index: -len(prompts[index]))
                for start in range(0, len(order), self.rows_at_once):
                    batch = order[start : start + self.rows_at_once]
                    # Without the prompt, since HFLM decodes a continuation alone: Llama's loses its first space.
                    rows = [Row(self.text_tokenizer, [], stop) for _ in batch]
                    for _ in continue_rows(
                        self.model,
                        rows,
                        [prompts[index] for index in batch],
                        max_new_tokens=max_new_tokens,
                        end_id=self.conventions.end_ids,
                        vocab_size=self.text_tokenizer.vocab_size,
                        sampling=sampling,
                        seed=self.seed + start,
                    ):
                        pass
                    for index, row in zip(batch, rows, strict=True):
                        texts[index] = row.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, row.text)
                    bar.update(len(batch))
        return texts


def _generation(arguments: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop strings, the maximum number of new tokens and the sampling, from a task's `generation_kwargs`."""
    remaining = dict(normalize_gen_kwargs(arguments, MAX_NEW_TOKENS))
    stop = [text for text in remaining.pop("until") if text]
    max_new_tokens, do_sample = remaining.pop("max_gen_toks"), remaining.pop("do_sample")
    if unknown := remaining.keys() - set(SAMPLING_OPTIONS):
        raise ValueError(
            f"A task asks for a generation with {', '.join(sorted(unknown))}; supported are until, max_gen_toks, "
            f"do_sample, {', '.join(SAMPLING_OPTIONS)}."
        )
    options = {name: value for name, value in remaining.items() if value is not None}
    if not do_sample:
        options |= {"temperature": 0.0}
    elif not options.get("temperature"):
        options |= {"temperature": 1.0}
    return stop, max_new_tokens, Sampling(**options)


class _Tasks(TaskManager):
    """Loads tasks by name; data that cannot be loaded raises a ValueError that names the remedy."""

    def load(self, task_list):
        try:
            return super().load(task_list)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise ValueError(
                f"The data of the tasks {', '.join(map(str, task_list))} cannot be loaded ({reason}); without a "
                "network, start in a folder that holds the data under its name on the hub, such as "
                "Rowan/hellaswag/validation.jsonl, or give tasks with local files by --include-path."
            ) from error


def evaluate_tasks(
    model: HarnessModel,
    names: Sequence[str],
    *,
    include_paths: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
) -> dict[str, Any]:
    """Runs lm-eval on tasks or groups of tasks. Returns its result object, with `results`, without samples.

    include_paths: folders with YAML files of more tasks. num_fewshot: examples before each question; each task's
    default if None. limit: maximum number of documents per task or, below 1, their fraction.
    Raises ValueError for unknown names and for data that cannot be loaded.
    """
    manager = _Tasks(include_path=list(include_paths), include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = _Tasks(include_path=list(include_paths))  # takes seconds, since it reads thousands of files
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"There is no task {', '.join(unknown)}; see `lm-eval ls tasks`, or give --include-path DIR.")
    results = simple_evaluate(
        model=model,
        tasks=list(names),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return dict(results)
