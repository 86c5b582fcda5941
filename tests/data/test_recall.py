"""Tasks of recall and state tracking, answered again by plain Python, and their labels up to a training row."""

from itertools import permutations

import numpy as np
import pytest
import torch

from tests.recall_answers import ANSWERED
from torchlmoe.config.load import load_config
from torchlmoe.data.loader import TrainLoader, validation_batches
from torchlmoe.data.order import RowOrder, Source
from torchlmoe.data.recall.store import RecallStore
from torchlmoe.data.recall.tasks import ASK, END, FIRST_SYMBOL, TASKS
from torchlmoe.data.recall.tokenizer import symbol_tokenizer
from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.training.data import load_tokenizer_of, training_sources, validation_store

OPTIONS = {
    "mqar": [{"length": 64, "num_pairs": 8}, {"length": 65, "num_pairs": 16, "min_pairs": 2}, {"power": 1.0}],
    "selective_copying": [{"length": 40}, {"length": 18, "num_symbols": 8}],
    "needle": [{"length": 32, "num_needles": 5}, {"length": 64, "num_needles": 3, "answer_length": 4}],
    "phonebook": [{"length": 64, "num_entries": 8}, {"length": 80, "num_entries": 8, "min_entries": 1}],
    "parity": [{"length": 33}],
    "s3": [{"length": 20}, {"length": 20, "elements": "swaps"}],
    "s5": [{"length": 20}, {"length": 20, "elements": "swaps"}],
}


@pytest.mark.parametrize(
    ("task", "options"), [(task, options) for task in TASKS for options in OPTIONS[task]], ids=lambda value: str(value)
)
def test_answers_are_those_of_plain_python(task, options):
    store = RecallStore(task, "train", **options)
    for number in range(30):
        tokens, labels, questions = store.document(number)
        assert len(tokens) == store.length
        assert tokens[0] == END
        assert END not in tokens[1:]
        assert 0 <= tokens.min() <= tokens.max() < store.vocab_size
        assert labels.tolist() == ANSWERED[task](tokens.tolist())
        assert ((labels == IGNORE_INDEX) == (questions == -1)).all()
        numbers = questions[questions >= 0]
        assert (np.diff(numbers) >= 0).all()
        assert set(numbers) == set(range(numbers.max() + 1))
        per_question = np.bincount(numbers)
        assert (per_question == per_question[0]).all()


def test_swaps_move_at_most_two_points():
    elements = list(permutations(range(5)))
    store = RecallStore("s5", "train", elements="swaps")
    read = {int(token) for number in range(50) for token in store.document(number).tokens[1:]}
    assert len(read) == 11
    assert all(sum(a != b for a, b in enumerate(elements[token - FIRST_SYMBOL])) in (0, 2) for token in read)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("num_needles", [1, 4])
def test_a_needle_is_at_its_depth(depth, num_needles):
    store = RecallStore("needle", "test", length=100, depth=depth, num_needles=num_needles)
    for number in range(20):
        tokens = store.document(number).tokens.tolist()
        (place,) = [
            place for place, token in enumerate(tokens[:-4]) if token == ASK and tokens[place + 1] == tokens[-3]
        ]
        num_words = 100 - 1 - 4 * (num_needles + 1)
        needles_before = sum(token == ASK for token in tokens[:place])
        assert place - 1 - 4 * needles_before == round(depth * num_words)
        assert depth not in (0, 1) or needles_before == (num_needles - 1) * depth or num_needles == 4


def test_a_document_is_a_function_of_seed_split_and_number():
    def drawn(split, seed, number):
        return RecallStore("mqar", split, seed=seed).document(number).tokens.tolist()

    assert drawn("train", 1, 7) == drawn("train", 1, 7)
    others = [drawn("train", 1, 8), drawn("train", 2, 7), drawn("validation", 1, 7), drawn("test", 1, 7)]
    assert drawn("train", 1, 7) not in others
    assert len({tuple(other) for other in others}) == 4
    contents = {
        RecallStore("mqar", "train", seed=seed, length=length).index.content for seed in (0, 1) for length in (64, 65)
    }
    assert len(contents) == 4


def test_parts_of_a_store_are_its_documents():
    store = RecallStore("parity", "train", length=7, num_documents=5)
    whole = np.concatenate([store.document(number).tokens for number in range(5)])
    labels = np.concatenate([store.document(number).labels for number in range(5)])
    for start in range(36):
        for stop in (start, start + 1, start + 9, 100):
            assert store.tokens(start, stop).tolist() == whole[start:stop].tolist()
            assert store.own_labels(start, stop).tolist() == labels[start:stop].tolist()


def test_a_training_row_has_the_tasks_labels():
    """Several documents a row, in any order: the label at each position is the document's own, not the next token."""
    config = load_config(
        "--data.dataset recall:s3 --data.reader_options.length 8 --data.reader_options.num_documents 11 "
        "--data.reader_options.validation_documents 5 --training.seq_len 24".split()
    )
    tokenizer = load_tokenizer_of(config.data)
    assert tokenizer.vocab_size == 9
    (source,) = training_sources(config.data, tokenizer)
    loader = TrainLoader(RowOrder([source], seq_len=24, global_batch_size=2), local_batch_size=2)
    seen = set()
    for step in range(2):
        for batch in loader.batches(step):
            for tokens, labels, bounds in zip(batch["tokens"], batch["labels"], batch["document_bounds"], strict=True):
                for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                    document = tokens[start:stop].tolist()
                    if len(document) == 8 and document[1] != END:
                        assert labels[start:stop].tolist() == ANSWERED["s3"](document)
                        seen.add(tuple(document))
                    else:  # what fills the last row up
                        assert (labels[start:stop] == IGNORE_INDEX).all()
    loader.close()
    assert len(seen) == 11

    store = validation_store(config.data, tokenizer)
    (batch,) = validation_batches(store, seq_len=24, batch_size=2)
    own = torch.from_numpy(np.concatenate([store.document(number).labels for number in range(5)]))
    assert torch.equal(batch["labels"].flatten()[:40], own)
    assert store.index.content != source.store.index.content


def test_a_mixture_of_tasks_has_one_vocabulary():
    config = load_config(
        [
            "--data.mixture",
            '[{dataset = "recall:parity"}, {dataset = "recall:mqar", weight = 3.0, reader_options = {num_pairs = 4}}]',
            "--data.validation_dataset=recall:mqar",
            "--training.seq_len=64",
        ]
    )
    tokenizer = load_tokenizer_of(config.data)
    assert tokenizer.vocab_size == 256
    sources = training_sources(config.data, tokenizer)
    assert [source.store.task for source in sources] == ["parity", "mqar"]
    assert validation_store(config.data, tokenizer).options["num_pairs"] == 4


def test_the_tokenizer_writes_numbers():
    tokenizer = symbol_tokenizer(12)
    assert tokenizer.encode_batch(["3 11 1"]) == [[3, 11, 1]]
    assert tokenizer.decode([3, 11, 1]) == "3 11 1"
    assert tokenizer.end_id == END


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--data.dataset recall:mqr", "there is no recall task 'mqr'; choose one of mqar, selective_copying"),
        ("--data.dataset recall:mqar --training.seq_len 100", "training.seq_len = 100 does not hold whole documents"),
        (
            "--data.dataset recall:mqar --data.reader_options.num_pairs 16",
            "length = 64 is too short for num_pairs = 16",
        ),
        ("--data.dataset recall:mqar --data.reader_options.min_pairs 9", "min_pairs = 9 is more than num_pairs = 8"),
        ("--data.dataset recall:mqar --data.reader_options.vocab_size 12", "has 4 keys for num_pairs = 8"),
        ("--data.dataset recall:mqar --data.reader_options.pairs 9", "reader_options.pairs is not a setting"),
        ("--data.dataset recall:mqar --data.reader_options.length x", "reader_options.length"),
        ("--data.dataset recall:s5 --data.reader_options.vocab_size 50", "vocab_size = 50 is less than the 123"),
        ("--data.dataset recall:needle --data.reader_options.num_needles 40", "length = 128 is too short"),
        ("--data.dataset recall:phonebook --data.reader_options.num_entries 99", "length = 128 is too short"),
        ("--data.dataset recall:phonebook --data.reader_options.vocab_size 8", "has 0 letters, too few for 8 names"),
        ("--data.dataset recall:selective_copying --data.reader_options.num_symbols 40", "length = 64 is too short"),
        ("--data.dataset recall:mqar --data.validation_dataset embedded", "cannot be combined with a recall task"),
        ("--data.validation_dataset recall:mqar", "cannot be combined with a recall task"),
    ],
)
def test_what_cannot_be_drawn_is_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?")) as raised:
        load_config(flags.split())
    assert "\n" not in str(raised.value)


def test_sources_are_named_by_their_task():
    store = RecallStore("mqar", "train")
    assert Source(store).store.text_bytes == 0
