"""Log-likelihoods against one forward pass per request: packed, shared, repeated, empty."""

import random

import pytest
import torch

from torchlmoe.evaluation import scores
from torchlmoe.evaluation.scores import Request, Score, score


@torch.no_grad()
def by_hand(model, request):
    row = [*request.context, *request.continuation]
    logits = model(torch.tensor([row]))[0, len(request.context) - 1 : -1]
    targets = torch.tensor(request.continuation, dtype=torch.int64)
    log_likelihood = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(log_likelihood), bool((logits.argmax(-1) == targets).all())


def requests():
    draw = random.Random(0)

    def tokens(length):
        return tuple(draw.randrange(4096) for _ in range(length))

    question = tokens(30)
    found = [Request(tokens(length), tokens(more)) for length, more in [(1, 1), (40, 3), (7, 60), (1, 90)]]
    found += [Request(question, tokens(length)) for length in (1, 1, 1, 4, 4, 9)]
    whole = question + tokens(8)
    found += [Request(whole[:cut], whole[cut:]) for cut in (30, 20, 37)]  # one input, cut in several places
    return [*found, found[1], Request(question, ())]


@pytest.mark.parametrize(("min_saved", "tokens_at_once"), [(1 << 30, 64), (1 << 30, 4096), (40, 64)])
def test_scores_are_those_of_each_request_alone(model, monkeypatch, min_saved, tokens_at_once):
    """Packed, and with the state of a shared context; the likeliest continuation is known to be it."""
    monkeypatch.setattr(scores, "MIN_SAVED", min_saved)
    asked = requests()
    with torch.no_grad():
        likeliest = int(model(torch.tensor([asked[1].context]))[0, -1].argmax())
    asked.append(Request(asked[1].context, (likeliest,)))
    finished = []
    found = score(model, asked, tokens_at_once=tokens_at_once, done=finished.append)
    assert sum(finished) == len(asked)
    for request, (log_likelihood, is_greedy) in zip(asked, found, strict=True):
        expected, greedy = (0.0, True) if not request.continuation else by_hand(model, request)
        assert log_likelihood == pytest.approx(expected, abs=1e-9)
        assert is_greedy == greedy
    assert found[-1].is_greedy
    assert not all(one.is_greedy for one in found)


def test_a_shared_context_is_read_once(model, monkeypatch):
    monkeypatch.setattr(scores, "MIN_SAVED", 40)
    numbers = []
    original = model.run_blocks
    monkeypatch.setattr(
        model, "run_blocks", lambda x, *rest: numbers.append(x.shape[0] * x.shape[1]) or original(x, *rest)
    )
    context = tuple(range(30))
    score(
        model,
        [Request(context, (1, 2, 3)), Request(context, (4, 5, 6)), Request(context, (7, 8)), Request(context, (9,))],
    )
    assert sum(numbers) == 30 + 2 * 2 + 1
    numbers.clear()
    score(model, [Request(context, (token,)) for token in range(4)])  # which differ in what is not read
    assert numbers == [30]


@pytest.mark.parametrize(("tokens_at_once", "most"), [(64, 32), (6, 3)])
def test_continuations_of_a_shared_context_are_read_in_batches(model, monkeypatch, tokens_at_once, most):
    """Of the new tokens, and of those in copies of the context's state."""
    monkeypatch.setattr(scores, "MIN_SAVED", 8)
    numbers = []
    run_blocks = model.run_blocks
    monkeypatch.setattr(model, "run_blocks", lambda x, *rest: (numbers.append(x.shape[:2]), run_blocks(x, *rest))[1])
    asked = [Request(tuple(range(10)), (token, token, token)) for token in range(50)]
    expected = [by_hand(model, request) for request in asked[:3]]
    numbers.clear()
    found = score(model, asked, tokens_at_once=tokens_at_once)
    rows = [shape[0] for shape in numbers[1:]]
    assert max(rows) == most
    assert sum(rows) == 50
    assert [one.log_likelihood for one in found[:3]] == pytest.approx([one for one, _ in expected], abs=1e-9)


def test_refusals(model):
    with pytest.raises(ValueError, match="A request has an empty context"):
        score(model, [Request((), (1,))])
    assert score(model, []) == []
    assert score(model, [Request((1,), ())]) == [Score(0.0, True)]
