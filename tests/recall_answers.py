"""The answers to tasks of recall and state tracking, found again in plain Python from a document's tokens alone."""

from itertools import permutations

import numpy as np

from torchlmoe.data.recall.tasks import ASK, BLANK, FIRST_SYMBOL
from torchlmoe.layers.cross_entropy import IGNORE_INDEX


def answered_mqar(tokens):
    """The label of every position, from the tokens alone; the other tasks' functions do the same."""
    values, labels = {}, [IGNORE_INDEX] * len(tokens)
    place = 1
    while place < len(tokens) and tokens[place] != BLANK and tokens[place] not in values:
        values[tokens[place]] = tokens[place + 1]
        place += 2
    for later, token in enumerate(tokens[place:], place):
        if token != BLANK:
            labels[later] = values[token]
    return labels


def answered_at_the_end(answer_of):
    """Of tasks whose answer is written down behind the last ASK and the question."""

    def answered(tokens):
        ask = len(tokens) - 1 - tokens[::-1].index(ASK)
        question_length, answer = answer_of(tokens[:ask], tokens[ask + 1 :])
        labels = [IGNORE_INDEX] * len(tokens)
        first = ask + question_length
        assert tokens[first + 1 :] == answer
        labels[first : first + len(answer)] = answer
        return labels

    return answered


def of_copying(before, _):
    return 0, [token for token in before[1:] if token != BLANK]


def of_needle(before, rest):
    (place,) = [place for place, token in enumerate(before) if token == ASK and before[place + 1] == rest[0]]
    return 1, before[place + 2 : place + 1 + len(rest)]


def of_phonebook(before, rest):
    entries, entry = {}, []
    for token in before[1:]:
        if token == BLANK:
            if entry:
                entries[tuple(entry[:2])] = entry[2:]
            entry = []
        else:
            entry.append(token)
    return 2, entries[tuple(rest[:2])]


def answered_group(degree):
    elements = list(permutations(range(degree)))

    def answered(tokens):
        state, labels = tuple(range(degree)), [IGNORE_INDEX]
        for token in tokens[1:]:
            element = elements[token - FIRST_SYMBOL]
            state = tuple(element[point] for point in state)
            labels.append(FIRST_SYMBOL + elements.index(state))
        return labels

    return answered


def answered_parity(tokens):
    ones = np.cumsum([token == FIRST_SYMBOL + 1 for token in tokens])
    return [IGNORE_INDEX, *(FIRST_SYMBOL + int(count) % 2 for count in ones[1:])]


ANSWERED = {
    "mqar": answered_mqar,
    "selective_copying": answered_at_the_end(of_copying),
    "needle": answered_at_the_end(of_needle),
    "phonebook": answered_at_the_end(of_phonebook),
    "parity": answered_parity,
    "s3": answered_group(3),
    "s5": answered_group(5),
}
