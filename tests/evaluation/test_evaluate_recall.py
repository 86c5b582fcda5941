"""Recall as an evaluation: figures of models whose answers are known, and generation beside likelihood."""

import json

import pytest
import torch

from tests.recall_answers import ANSWERED
from torchlmoe.config.load import load_config
from torchlmoe.config.settings import Data, MixtureSource
from torchlmoe.data.recall.store import RecallStore
from torchlmoe.evaluation import recall
from torchlmoe.evaluation.recall import RECALL, evaluate_recall, trained_options
from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.model.decoder import build_on_meta

SMALL = "--model.dim 16 --model.num_layers 2 --model.layer_pattern LN --model.num_heads 2 --model.layers.L.mlp none"
SMALL += " --model.layers.N.mlp none --model.init_std 1.0"


class Knowing(torch.nn.Module):
    """Answers as plain Python does, but for every `wrong`-th answer token."""

    def __init__(self, task, vocab_size, wrong=None):
        super().__init__()
        self.task, self.wrong, self.vocab_size = task, wrong, vocab_size
        self.embedding = torch.nn.Embedding(vocab_size, 1)

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for row, document in enumerate(tokens.tolist()):
            number = 0
            for place, label in enumerate(ANSWERED[self.task](document)):
                if label != IGNORE_INDEX:
                    number += 1
                    label = label - 1 if self.wrong and number % self.wrong == 0 else label
                    logits[row, place, label] = 30.0
        return logits


def small_model(vocab_size):
    model = build_on_meta(load_config(SMALL.split()), vocab_size)
    model.to_empty(device="cpu")
    model.init_weights(0)
    return model


@pytest.mark.parametrize("task", RECALL)
def test_one_who_knows_is_right_everywhere(task):
    result = evaluate_recall(Knowing(task, 256), [task], num_documents=3, batch_size=2)[task]
    assert json.loads(json.dumps(result)) == result
    assert [point["options"] for point in result["points"]] == list(RECALL[task])
    for point in result["points"]:
        assert point["exact_match"] == point["token_accuracy"] == point["last_exact_match"] == 1
        assert point["exact_match_se"] == 0
        assert point["nll"] < 1e-6


def test_tokens_and_questions_are_counted_apart():
    """Every fourth answer token wrong: three quarters of tokens, no number of four digits, every fourth key."""
    options = {"phonebook": {"number_length": 4}}
    point = {"phonebook": [{"num_entries": 4, "length": 48}], "mqar": [{"num_pairs": 8, "length": 64}]}
    for task, exact in (("phonebook", 0), ("mqar", 0.75)):
        result = evaluate_recall(Knowing(task, 256, wrong=4), [task], num_documents=4, options=options, points=point)
        (figures,) = result[task]["points"]
        assert figures["token_accuracy"] == 0.75
        assert figures["exact_match"] == exact
        assert figures["num_tokens"] == {"phonebook": 16, "mqar": 32}[task]
        assert figures["num_questions"] == {"phonebook": 4, "mqar": 32}[task]


def test_likelihood_is_that_of_the_models_logits():
    model = small_model(9)
    points = {"s3": [{"length": 12}]}
    (point,) = evaluate_recall(model, ["s3"], num_documents=5, batch_size=2, points=points)["s3"]["points"]
    store = RecallStore("s3", "test", length=12, validation_documents=5)
    nll, right = [], []
    for number in range(5):
        tokens, labels, _ = (torch.from_numpy(part) for part in store.document(number))
        log_probabilities = model(tokens[None])[0].log_softmax(-1)
        for place in range(1, 12):
            nll.append(-log_probabilities[place, labels[place]].item())
            right.append((log_probabilities[place].argmax() == labels[place]).item())
    assert point["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert point["token_accuracy"] == pytest.approx(sum(right) / len(right))
    assert 0 < point["token_accuracy"] < 1


@pytest.mark.parametrize(("task", "vocab_size"), [("s3", 14), ("phonebook", 20)])
def test_generation_agrees_with_likelihood(task, vocab_size):
    """Answers of one token."""
    model = small_model(vocab_size)
    points = {"s3": [{"length": 9}], "phonebook": [{"num_entries": 2, "length": 24, "name_length": 3}]}
    options = {"phonebook": {"number_length": 1, "vocab_size": 20}, "s3": {"vocab_size": 9}}
    arguments = dict(options=options, points=points, num_documents=40)
    (by_likelihood,) = evaluate_recall(model, [task], **arguments)[task]["points"]
    (by_generation,) = evaluate_recall(model, [task], by="generation", **arguments)[task]["points"]
    assert by_generation["exact_match"] == by_likelihood["last_exact_match"]
    assert 0 < by_generation["exact_match"] < 1
    assert by_generation["num_questions"] == 40


def test_generation_continues_the_tokens_before_an_answer(monkeypatch):
    """Of every second document the last digit is generated wrong."""
    store = RecallStore("phonebook", "test", num_entries=3, length=40, validation_documents=6)
    numbers = iter(range(6))

    def generate(model, prompts, *, max_new_tokens):
        assert max_new_tokens == 4
        written = []
        for number, prompt in zip(numbers, prompts, strict=False):
            document = store.document(number)
            assert prompt == document.tokens[:-4].tolist()
            answer = document.tokens[-4:].tolist()
            written.append([*answer[:3], answer[3] + number % 2])
        return written

    monkeypatch.setattr(recall, "generate", generate)
    points = {"phonebook": [{"num_entries": 3, "length": 40}]}
    arguments = dict(points=points, num_documents=6, batch_size=6, by="generation")
    (point,) = evaluate_recall(Knowing("phonebook", 64), ["phonebook"], **arguments)["phonebook"]["points"]
    assert point["exact_match"] == 0.5
    assert point["token_accuracy"] == 7 / 8


def test_the_models_end_token_takes_the_place_of_the_tasks():
    class Watching(Knowing):
        def forward(self, tokens):
            assert (tokens[:, 0] == 5).all()
            assert not (tokens[:, 1:] == 5).any()
            assert (tokens == 0).any()
            return torch.zeros(*tokens.shape, self.vocab_size)

    evaluate_recall(Watching("s3", 9), ["s3"], end_id=5, num_documents=4, points={"s3": [{"length": 40}]})


def test_bad_input():
    model = Knowing("s3", 9)
    for arguments, sentence in (
        (dict(names=["s4"]), "There is no recall task 's4'; choose from mqar"),
        (dict(names=["s5"]), "vocab_size = 9 is less than the 123"),
        (dict(names=["s3"], options={"s3": {"vocab_size": 20}}), "is more than the model's 9 tokens"),
        (dict(names=["s3"], by="guess"), "by = 'guess' must be one of likelihood, generation"),
        (dict(names=["s3"], num_documents=0), "num_documents = 0 and batch_size = 16 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate_recall(model, **arguments)


def test_points_that_do_not_fit_the_options_are_left_out():
    """The vocabulary of the recipe has 30 keys."""
    found = evaluate_recall(Knowing("mqar", 64), ["mqar"], options={"mqar": {"vocab_size": 64}}, num_documents=2)[
        "mqar"
    ]
    assert [point["options"]["num_pairs"] for point in found["points"]] == [4, 8, 16]
    assert [left["options"]["num_pairs"] for left in found["left_out"]] == [32, 64]
    assert "num_pairs = 32" in found["left_out"][0]["reason"]
    assert found["exact_match"] == 1
    with pytest.raises(ValueError, match="num_pairs = 32"):
        evaluate_recall(
            Knowing("mqar", 64), ["mqar"], options={"mqar": {"vocab_size": 64}}, points={"mqar": RECALL["mqar"]}
        )


def test_options_of_a_run():
    """Also of a mixture, and without the least number of pairs, which would make a point's number an upper bound."""
    given = {"vocab_size": 64, "min_pairs": 2}
    assert trained_options(Data(dataset="recall:mqar", reader_options=given)) == {"mqar": {"vocab_size": 64}}
    assert trained_options(Data()) == trained_options(Data(dataset="mqar")) == {}
    sources = [
        MixtureSource("recall:s3", reader_options={"length": 8}),
        MixtureSource("recall:mqar"),
        MixtureSource("x"),
    ]
    assert trained_options(Data(mixture=sources)) == {"s3": {"length": 8}, "mqar": {}}
