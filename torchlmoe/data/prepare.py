"""Tokenizes one split of a dataset into a token store. Later runs and other processes reuse the store.

The corpus is cut into pieces, which any number of processes on any number of hosts tokenize. If they are killed, the
finished pieces are kept. The store depends only on the corpus and the tokenizer, not on who builds it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from torchlmoe.data import writers
from torchlmoe.data.corpus import Corpus, open_corpus
from torchlmoe.data.parts import Parts, ShardFacts, replace
from torchlmoe.data.progress import Task, TokenizationProgress
from torchlmoe.data.store import TokenStore
from torchlmoe.data.store_writer import failures_named, publish_store, token_dtype
from torchlmoe.data.token_files import index_token_files
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.data.tokenizing import Job
from torchlmoe.data.workers import do_task, do_tasks

logger = logging.getLogger(__name__)

# Part of every store's name: increase it if a change makes other tokens from the same recipe.
FORMAT = 2
NAME_BYTES = 100  # of the dataset's name in that of its folder; file systems allow 255 for the whole name
SECONDS_BETWEEN_LOOKS = 0.5  # between two looks for the results of other hosts
SECONDS_BETWEEN_LINES = 60.0


@dataclass(frozen=True)
class Effort:
    """The processes and hosts that tokenize.

    num_workers: processes on this host; as many as it has cores if None. num_writers: hosts that share the folder and
    the work. writer: this host's number, from 0. timeout: seconds without a sign of life after which a writer is lost.
    Raises ValueError unless writer < num_writers.
    """

    num_workers: int | None = None
    num_writers: int = 1
    writer: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not 0 <= self.writer < self.num_writers:
            raise ValueError(
                f"data.writer = {self.writer} must be less than data.num_writers = {self.num_writers}: writers are "
                "numbered from 0."
            )

    @property
    def processes(self) -> int:
        """Number of processes on this host."""
        if self.num_workers is not None:
            return self.num_workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(
    dataset: str,
    split: str,
    *,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    max_tokens: int | None = None,
    effort: Effort | None = None,
    **options: Any,
) -> TokenStore:
    """Returns the token store of one split, "train" or "validation", and builds it if `cache_dir` does not have it.

    Its folder is named by a hash of everything that it depends on: the dataset (local files by path, size and times of
    change), the tokenizer, `max_tokens` and the options. One of several processes builds it, the others wait.

    max_tokens: maximum number of tokens, including end tokens; the last document may be cut. None for all.
    effort: the processes and hosts that build it; by default one process per core of this host.
    options: see corpus.open_corpus. Documents without text are left out.
    Raises ValueError if the dataset does not exist or has no text, TimeoutError if another writer is lost, and OSError
    if the store cannot be written.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens = {max_tokens} leaves no text to read: give at least 2.")
    corpus = open_corpus(dataset, split, **options)
    recipe = {
        "format": FORMAT,
        "corpus": corpus.identity,
        "tokenizer": tokenizer.fingerprint,
        "end_token": tokenizer.end_token,
        "max_tokens": max_tokens,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    if not str(cache_dir):
        raise ValueError("data.cache_dir is empty: give a folder, or leave it unset.")
    readable = re.sub(r"[^\w.-]+", "-", Path(corpus.name).name).encode()[:NAME_BYTES].decode(errors="ignore")
    folder = Path(cache_dir).expanduser() / f"{readable}-{split}-{digest}"
    build = _Build(folder, corpus, split, tokenizer, recipe, max_tokens, effort or Effort())
    return build.store()


class _Build:
    """Builds one store."""

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        split: str,
        tokenizer: Tokenizer,
        recipe: dict,
        max_tokens: int | None,
        effort: Effort,
    ):
        self.folder, self.corpus, self.split = folder, corpus, split
        self.tokenizer, self.recipe, self.max_tokens, self.effort = tokenizer, recipe, max_tokens, effort
        self.parts = Parts(folder)

    def store(self) -> TokenStore:
        """Open the store. If it is missing, the first process builds it, or several writers together."""
        if not self.folder.exists():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with failures_named(self.parts.partial):
                if self.corpus.token_files is not None:
                    with _lock(self.folder):
                        if not self.folder.exists():
                            return index_token_files(
                                self.folder, self.corpus, self.split, self.tokenizer, self.recipe, self.max_tokens
                            )
                else:
                    self._build()
        if self.parts.folder.exists():  # a process was killed after it had completed the store
            shutil.rmtree(self.parts.folder, ignore_errors=True)
        return TokenStore(self.folder)

    def _build(self) -> None:
        if self.effort.num_writers == 1:
            with _lock(self.folder):
                if not self.folder.exists():
                    self.parts.create()
                    self._tokenize()
                    self._publish()
            return
        with _lock(self.folder.with_name(f"{self.folder.name}.writer-{self.effort.writer}")):
            if self.folder.exists():
                return
            self.parts.create()
            with writers.SignOfLife(self.parts.folder, self.effort.writer):
                self._tokenize()
                self._wait(self._is_whole, self.parts.is_done, "shares")
                with _lock(self.folder):
                    if not self.folder.exists():
                        self._publish()

    def _tokenize(self) -> None:
        """Tokenize the pieces of this writer."""
        pieces, effort = self.job.reading.pieces, self.effort
        own = range(effort.writer, len(pieces), effort.num_writers)
        sizes = {piece: pieces[piece].num_bytes for piece in own if not self.parts.is_done(piece)}
        try:
            with TokenizationProgress(f"{self.corpus.name}, {self.split}", sizes, self.max_tokens) as progress:
                if self.job.counts:
                    uncounted = [Task(piece, only_count=True) for piece in own if self.parts.count(piece) is None]
                    self._do(iter(uncounted), len(uncounted), progress)
                    self._wait(self._all_counted, self._is_counted, "counts")
                self._do(self._tasks(own), len(sizes), progress)
        except ValueError:
            if effort.num_writers == 1:  # once corrected, the corpus is another one, which cannot use these parts
                self.parts.remove()
            raise

    @cached_property
    def job(self) -> Job:
        """How the corpus is read, at the revision that the first process recorded."""
        plan = self.parts.folder / "plan.json"
        if not plan.exists():
            reading = self.corpus.read(None)
            own_plan = plan.with_name(f"plan.{socket.gethostname()}.{os.getpid()}")
            replace(own_plan, json.dumps({"revision": reading.revision}).encode())
            with suppress(FileExistsError):  # another host was faster
                os.link(own_plan, plan)
            own_plan.unlink()
        return Job(self.corpus.read(json.loads(plan.read_text())["revision"]), self.tokenizer, self.parts)

    def _tasks(self, own: range) -> Iterator[Task]:
        """Yield the remaining pieces until there are enough tokens. A task is made when a process is free for it."""
        for piece in own:
            if self._has_enough():
                return
            if not self.parts.is_done(piece):
                yield Task(piece, self._limit(piece))

    def _limit(self, piece: int) -> int | None:
        """Maximum number of tokens that the store can need of a piece, as far as earlier pieces are done."""
        if self.max_tokens is None:
            return None
        before = list(self._done_in_order(piece))
        return self.max_tokens - (sum(map(self.parts.tokens_of, before)) if len(before) == piece else 0)

    def _done_in_order(self, stop: int) -> Iterator[int]:
        """Yield the pieces before `stop` that are done, up to the first that is not."""
        return takewhile(self.parts.is_done, range(stop))

    def _has_enough(self) -> bool:
        if self.max_tokens is None:
            return False
        done = self._done_in_order(len(self.job.reading.pieces))
        return sum(map(self.parts.tokens_of, done)) >= self.max_tokens

    def _do(self, tasks: Iterator[Task], most: int, progress: TokenizationProgress) -> None:
        num_workers = min(self.effort.processes, most)
        if num_workers > 1:
            do_tasks(self.job, tasks, num_workers, progress)
            return
        with _threads(self.effort.num_workers != 1):
            for task in tasks:
                do_task(self.job, task, progress.add)
                progress.finish(task)

    def _is_counted(self, piece: int) -> bool:
        return self.parts.count(piece) is not None

    def _all_counted(self) -> bool:
        return all(map(self._is_counted, range(len(self.job.reading.pieces))))

    def _is_whole(self) -> bool:
        """Whether all pieces that the store needs are done, or the store itself exists."""
        if self.folder.exists() or self._has_enough():
            return True
        num_pieces = len(self.job.reading.pieces)
        return sum(1 for _ in self._done_in_order(num_pieces)) == num_pieces

    def _wait(self, until: Callable[[], bool], has: Callable[[int], bool], name: str) -> None:
        """Wait for results of all writers. Raises TimeoutError if a writer is lost.

        until: returns whether all results exist. has: whether that of a piece does. name: of the results, for messages.
        """
        effort = self.effort
        watch = writers.Watch(self.parts.folder, effort.timeout)
        last_said = last_looked = time.monotonic()
        while not until():
            time.sleep(SECONDS_BETWEEN_LOOKS)
            now = time.monotonic()
            if now - last_looked < writers.SECONDS_BETWEEN_SIGNS:
                continue
            last_looked = now
            pieces = range(len(self.job.reading.pieces))
            missing = sorted({piece % effort.num_writers for piece in pieces if not has(piece)})
            if (lost := watch.lost(missing)) and not until():
                raise TimeoutError(
                    f"The {name} of {_writers(lost)} of {self.folder.name} are missing, without a sign of life for "
                    f"data.writer_timeout_seconds = {effort.timeout:g}: start the command again on all hosts, with a "
                    f"lower data.num_writers (now {effort.num_writers}) if there are fewer; it continues from what is "
                    "finished."
                )
            if now - last_said > SECONDS_BETWEEN_LINES:
                last_said = now
                logger.info(f"Waiting for the {name} of {_writers(missing)} of {self.folder.name}.")

    def _publish(self) -> None:
        dtype = token_dtype(self.tokenizer.vocab_size)
        places: list[tuple[int, int]] = []  # piece and number of each shard
        num_tokens = 0
        for piece in range(len(self.job.reading.pieces)):
            room = None if self.max_tokens is None else self.max_tokens - num_tokens
            if room == 0:
                break
            if room is not None and self.parts.tokens_of(piece) > room:
                # It was written before the tokens of earlier pieces were known, and is too long.
                self.parts.forget(piece)
                do_task(self.job, Task(piece, room), lambda *more: None)
            num_tokens += self.parts.tokens_of(piece)
            places += [(piece, number) for number, _ in enumerate(self.parts.of_piece(piece))]
        facts = [self.parts.of_piece(piece)[number] for piece, number in places]
        if num_tokens == 0:
            self.parts.remove()
            raise _no_text(self.corpus.name, self.split)
        _warn_of_dropped(self.corpus.name, facts)
        with_tokens = [place for place, each in zip(places, facts, strict=True) if each.num_tokens]
        publish_store(
            self.parts.partial,
            self.folder,
            shards=[self.parts.shard(*place, dtype) for place in with_tokens],
            lengths=(self.parts.lengths(*place) for place in with_tokens),
            recipe=self.recipe | ({"commit": commit} if (commit := self.job.reading.revision) else {}),
            vocab_size=self.tokenizer.vocab_size,
            end_id=self.tokenizer.end_id,
            text_bytes=sum(each.text_bytes for each in facts),
            token_bytes=self.tokenizer.token_bytes() if all(each.has_token_bytes for each in facts) else None,
        )


def _writers(numbers: list[int]) -> str:
    """ "writer 3", or "writers 0, 1, 2" with at most eight numbers."""
    shown = ", ".join(map(str, numbers[:8])) + f" and {len(numbers) - 8} more" * (len(numbers) > 8)
    return f"{'writer' if len(numbers) == 1 else 'writers'} {shown}"


def _lock(folder: Path) -> AcquireReturnProxy:
    """Acquires the lock of a store's folder. Use it in a `with` statement, which releases it."""
    lock = FileLock(f"{folder}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"Another process is tokenizing {folder.name}: waiting for it.")
        return lock.acquire()


@contextmanager
def _threads(several: bool) -> Iterator[None]:
    """Sets whether the tokenizer may use several threads, within the context."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if not several:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _no_text(name: str, split: str) -> ValueError:
    remedy = "give it some"
    if split == "validation":
        remedy = (
            "give a data.validation_dataset, set validation.enable = false, or, where there are many "
            "documents, raise data.validation_fraction"
        )
    return ValueError(f"The {split} split of {name} has no documents with text: {remedy}.")


def _warn_of_dropped(name: str, facts: list[ShardFacts]) -> None:
    dropped = list(dict.fromkeys(character for each in facts for character in each.dropped))
    if dropped:
        examples = ", ".join(map(repr, dropped[:5]))
        logger.warning(
            f"The tokenizer has no token for some characters of {name}, such as {examples}, and drops them: "
            "the model never sees this text, and bits per byte are too low by as much as it would have cost."
        )
