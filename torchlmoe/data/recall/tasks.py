"""Recall and state-tracking tasks. Each is a function that draws one document; its keyword arguments are settings.

A document has `length` tokens and a label for each. It begins with the end token. Labels of answers are token ids, and
all others are IGNORE_INDEX. A label need not be the next token: an answer that would reveal the next one is not written
into the document. The vocabulary of all tasks is END, BLANK (padding), ASK (a question follows), and then symbols.
"""

from collections.abc import Callable
from itertools import permutations
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.registry import Registry

END, BLANK, ASK, FIRST_SYMBOL = range(4)
MOST_SYMBOLS = 2**20


class Document(NamedTuple):
    """One document of a task.

    tokens, labels: int64 [length]. questions: int64 [length], number of the question that a label answers; -1 without a
    label.
    """

    tokens: np.ndarray
    labels: np.ndarray
    questions: np.ndarray


Length = Annotated[int, Field(ge=4, le=2**24, description="Tokens in a document.")]
VocabSize = Annotated[int, Field(ge=8, le=MOST_SYMBOLS, description="Token ids that the task uses.")]

TASKS: Registry[Callable[..., Document]] = Registry("Recall task", {})


@TASKS.register("mqar")
def mqar(
    rng: np.random.Generator,
    *,
    length: Length = 64,
    num_pairs: Annotated[int, Field(ge=1, description="Keys with a value, each asked for once.")] = 8,
    min_pairs: Annotated[
        int | None, Field(ge=1, description="Draw the number of pairs from here to num_pairs; num_pairs if unset.")
    ] = None,
    power: Annotated[
        float, Field(ge=1e-6, le=1, description="The smaller, the nearer questions are to the pairs.")
    ] = 0.01,
    vocab_size: VocabSize = 256,
) -> Document:
    """Multi-query associative recall (arXiv 2312.04927): pairs of a key and its value, then the keys among blanks.

    The label of a key in the second part is its value, which is not written after it. The distances of questions from
    the pairs follow the paper's power law.
    """
    keys, values = _halves(vocab_size)
    _need(len(keys) >= num_pairs, f"vocab_size = {vocab_size} has {len(keys)} keys for num_pairs = {num_pairs}")
    _need_tokens(length, 1 + 4 * num_pairs, f"num_pairs = {num_pairs}")
    num_pairs = _between(rng, "pairs", min_pairs, num_pairs)
    slots = (length - 1 - 2 * num_pairs) // 2
    document = _blank(length)
    questions = rng.choice(keys, num_pairs, replace=False)
    answers = rng.choice(values, num_pairs)
    document.tokens[1 : 1 + 2 * num_pairs : 2] = questions
    document.tokens[2 : 2 + 2 * num_pairs : 2] = answers
    weights = np.arange(1, slots + 1) ** (power - 1)
    places = 1 + 2 * num_pairs + 2 * rng.choice(slots, num_pairs, replace=False, p=weights / weights.sum())
    document.tokens[places] = questions
    document.labels[places] = answers
    document.questions[np.sort(places)] = np.arange(num_pairs)
    return document


@TASKS.register("selective_copying")
def selective_copying(
    rng: np.random.Generator,
    *,
    length: Length = 64,
    num_symbols: Annotated[int, Field(ge=1, description="Symbols to copy.")] = 8,
    vocab_size: VocabSize = 32,
) -> Document:
    """Symbols at random places among blanks. The end of the document repeats them in order (arXiv 2312.00752)."""
    symbols = np.arange(FIRST_SYMBOL, vocab_size)
    _need_tokens(length, 2 + 2 * num_symbols, f"num_symbols = {num_symbols}")
    start = length - 1 - num_symbols  # place of the question
    document = _blank(length)
    copied = rng.choice(symbols, num_symbols)
    document.tokens[1 + np.sort(rng.choice(start - 1, num_symbols, replace=False))] = copied
    _ask(document, start, np.empty(0, dtype=np.int64), copied)
    return document


@TASKS.register("needle")
def needle(
    rng: np.random.Generator,
    *,
    length: Length = 128,
    depth: Annotated[
        float | None, Field(ge=0, le=1, description="Where the needle asked for is: 0 first, 1 last; drawn if unset.")
    ] = None,
    num_needles: Annotated[int, Field(ge=1, description="Needles, of which the question names one.")] = 1,
    answer_length: Annotated[int, Field(ge=1, description="Symbols in a needle's value.")] = 2,
    vocab_size: VocabSize = 256,
) -> Document:
    """A needle in a haystack (after RULER, arXiv 2404.06654): ASK, a key and its value between words. The end of the
    document asks for the key.

    Keys and values are symbols of one half of the vocabulary, words are symbols of the other half. Keys are distinct.
    """
    words, symbols = _halves(vocab_size)
    size = 2 + answer_length  # tokens of a needle, and of the question with its answer
    num_words = length - 1 - size * (num_needles + 1)
    _need_tokens(length, length - num_words, f"num_needles = {num_needles} with answer_length = {answer_length}")
    _need(len(symbols) >= num_needles, f"vocab_size = {vocab_size} has {len(symbols)} keys for {num_needles} needles")
    keys = rng.choice(symbols, num_needles, replace=False)
    values = rng.choice(symbols, (num_needles, answer_length))
    before = np.sort(rng.integers(0, num_words + 1, num_needles))  # words before each needle
    asked = int(rng.integers(num_needles))
    if depth is not None:
        others = np.delete(before, asked)
        asked = int(np.searchsorted(others, round(depth * num_words), side="left" if depth < 0.5 else "right"))
        before = np.insert(others, asked, round(depth * num_words))
    needles = np.concatenate([np.full((num_needles, 1), ASK), keys[:, None], values], 1)
    document = _blank(length)
    document.tokens[1 : length - size] = np.insert(
        rng.choice(words, num_words), np.repeat(before, size), needles.flatten()
    )
    _ask(document, length - size, keys[asked : asked + 1], values[asked])
    return document


@TASKS.register("phonebook")
def phonebook(
    rng: np.random.Generator,
    *,
    length: Length = 128,
    num_entries: Annotated[int, Field(ge=1, description="Names with a number.")] = 8,
    min_entries: Annotated[
        int | None, Field(ge=1, description="Draw the number of entries from here to num_entries; that if unset.")
    ] = None,
    name_length: Annotated[int, Field(ge=1, le=64, description="Symbols in a name.")] = 2,
    number_length: Annotated[int, Field(ge=1, le=64, description="Digits, of ten, in a number.")] = 4,
    vocab_size: VocabSize = 64,
) -> Document:
    """Names, each with a number of several digits. The end of the document asks for one of them (arXiv 2402.01032)."""
    digits, letters = np.arange(FIRST_SYMBOL, FIRST_SYMBOL + 10), np.arange(FIRST_SYMBOL + 10, vocab_size)
    size = name_length + number_length + 1
    _need_tokens(length, 1 + size * (num_entries + 1), f"num_entries = {num_entries}")
    _need(
        len(letters) ** name_length >= num_entries,
        f"vocab_size = {vocab_size} has {max(len(letters), 0)} letters, too few for {num_entries} names of "
        f"{name_length}",
    )
    num_entries = _between(rng, "entries", min_entries, num_entries)
    names: dict[tuple[int, ...], None] = {}
    while len(names) < num_entries:
        names[tuple(rng.choice(letters, name_length).tolist())] = None
    entries = np.concatenate(
        [np.array(list(names)), rng.choice(digits, (num_entries, number_length)), np.full((num_entries, 1), BLANK)], 1
    )
    document = _blank(length)
    start = length - size  # place of the question; blanks precede the first entry
    document.tokens[start - size * num_entries : start] = entries.flatten()
    asked = entries[rng.integers(num_entries)]
    _ask(document, start, asked[:name_length], asked[name_length:-1])
    return document


@TASKS.register("parity")
def parity(rng: np.random.Generator, *, length: Length = 64, vocab_size: VocabSize = 8) -> Document:
    """Bits. The label of each is the parity of the bits so far (arXiv 2411.12537)."""
    document = _blank(length)
    bits = rng.integers(0, 2, length - 1)
    return _track(document, bits, np.bitwise_xor.accumulate(bits))


def _permutations(degree: int) -> Callable[..., Document]:
    elements = np.array(list(permutations(range(degree))))
    number = {tuple(element): index for index, element in enumerate(elements.tolist())}
    # products[a, b]: first b, then a. A swap exchanges two points or none.
    products = np.array([[number[tuple(a[b])] for b in elements] for a in elements])
    swaps = np.flatnonzero((elements != np.arange(degree)).sum(1) <= 2)
    least = FIRST_SYMBOL + len(elements)
    smallest = max(least, 8)  # 8 is the lower limit of the setting

    def compose(
        rng: np.random.Generator,
        *,
        length: Length = 32,
        elements: Annotated[
            Literal["all", "swaps"], Field(description="Which permutations are read: all, or those of two points.")
        ] = "all",
        vocab_size: VocabSize = smallest,
    ) -> Document:
        """Permutations. The label of each is the product of all so far, with the newest applied last.

        Source: arXiv 2411.12537.
        """
        _need(
            vocab_size >= least,
            f"vocab_size = {vocab_size} is less than the {least} that permutations of {degree} take",
        )
        read = rng.choice(len(products) if elements == "all" else swaps, length - 1)
        state, states = 0, []  # the identity is first
        for element in read:
            state = int(products[element, state])
            states.append(state)
        return _track(_blank(length), read, np.array(states))

    return compose


TASKS.update({"s3": _permutations(3), "s5": _permutations(5)})


def _blank(length: int) -> Document:
    tokens = np.full(length, BLANK, dtype=np.int64)
    tokens[0] = END
    return Document(tokens, np.full(length, IGNORE_INDEX, dtype=np.int64), np.full(length, -1, dtype=np.int64))


def _track(document: Document, read: np.ndarray, states: np.ndarray) -> Document:
    document.tokens[1:] = FIRST_SYMBOL + read
    document.labels[1:] = FIRST_SYMBOL + states
    document.questions[1:] = np.arange(len(read))
    return document


def _ask(document: Document, start: int, question: np.ndarray, answer: np.ndarray) -> None:
    """Write ASK, the question and the answer at `start`. The symbols of the answer are the labels of one question."""
    first = start + len(question)  # the token whose label is the answer's first symbol
    document.tokens[start] = ASK
    document.tokens[start + 1 : first + 1] = question
    document.tokens[first + 1 : first + 1 + len(answer)] = answer
    document.labels[first : first + len(answer)] = answer
    document.questions[first : first + len(answer)] = 0


def _halves(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    middle = (FIRST_SYMBOL + vocab_size) // 2
    return np.arange(FIRST_SYMBOL, middle), np.arange(middle, vocab_size)


def _between(rng: np.random.Generator, name: str, least: int | None, most: int) -> int:
    if least is None:
        return most
    _need(least <= most, f"min_{name} = {least} is more than num_{name} = {most}")
    return int(rng.integers(least, most + 1))


def _need_tokens(length: int, needed: int, by: str) -> None:
    _need(length >= needed, f"length = {length} is too short for {by}: that takes {needed} tokens")


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"{otherwise}: choose other reader_options.")
