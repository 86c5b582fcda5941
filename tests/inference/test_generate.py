"""Generation against the whole forward pass, for every mixer; ends, seeds, memory, counters, refusals."""

import pytest
import torch

from torchlmoe.config.load import load_config
from torchlmoe.inference import cache as caches
from torchlmoe.inference import compiled
from torchlmoe.inference.generate import generate, generate_stepwise
from torchlmoe.inference.sampling import Sampling
from torchlmoe.mixers import MIXERS
from torchlmoe.model.decoder import build_on_meta

SMALL = """--model.dim 32 --model.num_heads 2 --model.num_layers 2 --model.vocab_size 50
--moe.num_experts 4 --moe.top_k 2 --moe.expert_dim 16 --model.init_std 0.3
--model.embedding_multiplier 3 --model.logit_divisor 2""".split()
LENGTHS = [5, 1, 40, 5, 3]  # two of one length, not side by side


def build(*arguments, dtype=torch.float64):
    config = load_config([*SMALL, *arguments])
    model = build_on_meta(config, config.model.vocab_size).to(dtype).to_empty(device="cpu")
    model.init_weights(seed=0)
    return model


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(50, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def assert_greedy(model, prompt, continuation):
    """Each token is the likeliest one after all before it, by one forward pass over the whole row."""
    row = torch.tensor([[*prompt, *continuation]])
    assert model(row)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == continuation


@pytest.mark.parametrize("pattern", ["L", "LN"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_tokens_are_those_of_the_whole_forward_pass(mixer, pattern, monkeypatch):
    monkeypatch.setattr(caches, "PIECE", 16)
    model = build("--model.layer_pattern", pattern, "--model.mixer", mixer)
    continuations = generate(model, prompts(), max_new_tokens=128)
    for prompt, continuation in zip(prompts(), continuations, strict=True):
        assert len(continuation) == 128
        assert_greedy(model, prompt, continuation)
    assert len({token for row in continuations for token in row}) > 5


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_low_precision_stays_near(mixer):
    """A prefill and 20 steps err as the whole forward pass does; dense, so that no choice of experts can flip."""
    arguments = ("--model.layer_pattern", "L", "--model.mixer", mixer, "--model.layers.L.mlp", "dense")
    tokens = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(0))
    pieces = list(zip(*(x.split([10] + [1] * 20, 1) for x in (tokens, torch.arange(30).expand(2, -1))), strict=True))
    exact = build(*arguments)(tokens)[:, 9:]
    for dtype in (torch.float32, torch.bfloat16):
        model = build(*arguments, dtype=dtype)
        cache = model.init_cache(2, 30)
        stepwise = torch.stack([model.next_logits(piece, places, cache) for piece, places in pieces], 1)
        assert stepwise.dtype is dtype
        whole = model(tokens)[:, 9:]
        assert (stepwise - exact).norm() <= 1.5 * (whole - exact).norm() <= 0.3 * exact.norm()


@pytest.mark.parametrize("mixer", MIXERS)
def test_cache_stays_in_place_and_only_attention_grows(mixer):
    model = build("--model.layer_pattern", "L", "--model.mixer", mixer)
    cache = model.init_cache(3, 20)
    places = {name: tensor.data_ptr() for name, tensor in cache.items(True, True)}
    with torch.inference_mode():
        model.next_logits(torch.ones(3, 7, dtype=torch.int64), torch.arange(7).expand(3, -1), cache)
        model.next_logits(torch.ones(2, 1, dtype=torch.int64), torch.full((2, 1), 7), cache[1:])
    assert {name: tensor.data_ptr() for name, tensor in cache.items(True, True)} == places
    num_bytes = sum(tensor.nbytes for tensor in cache.values(True, True))
    longer = sum(tensor.nbytes for tensor in model.init_cache(3, 20_000).values(True, True))
    assert longer == num_bytes * (1000 if mixer == "attention" else 1)
    if mixer != "rebased":  # whose state is float64 in a float32 model, too
        assert model.init_cache(3, 20, torch.float32).bytes() < num_bytes


def test_a_row_ends_at_the_end_token_and_the_others_continue():
    model = build()
    whole = generate(model, prompts(), max_new_tokens=24)
    end_id = whole[2][9]
    expected = [row[: row.index(end_id)] if end_id in row else row for row in whole]
    steps = list(generate_stepwise(model, prompts(), max_new_tokens=24, end_id=end_id))
    assert len(steps) == max(map(len, expected))
    assert [[token for token in row if token is not None] for row in zip(*steps, strict=True)] == expected
    assert generate(model, prompts()[2:3], max_new_tokens=24, end_id=end_id) == expected[2:3]


def test_draws_depend_on_the_seed_only():
    model = build()
    options = dict(max_new_tokens=12, sampling=Sampling(temperature=2.0, top_k=20))
    first = generate(model, prompts(), seed=1, **options)
    assert generate(model, prompts(), seed=1, **options) == first
    assert generate(model, prompts(), seed=2, **options) != first
    cold = dict(options, sampling=Sampling(temperature=1e-9))
    assert generate(model, prompts(), **cold) == generate(model, prompts(), max_new_tokens=12)


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_chosen():
    model = build()
    (row,) = generate(model, [[1, 2]], max_new_tokens=60, vocab_size=10, sampling=Sampling(temperature=3.0))
    assert set(row) == set(range(10))
    with pytest.raises(ValueError, match="token ids from 1 to 10, but there are 10 tokens"):
        generate(model, [[1, 10]], max_new_tokens=1, vocab_size=10)


def test_repetition_penalty_sees_prompt_and_continuation():
    """So large that no token comes twice, the end token aside."""
    (row,) = generate(build(), [[3, 0, 7]], max_new_tokens=30, sampling=Sampling(0.0, repetition_penalty=1e9))
    assert len({3, 0, 7, *row}) == 33
    (row,) = generate(build(), [[3, *row]], max_new_tokens=30, end_id=3, sampling=Sampling(0.0, repetition_penalty=1e9))
    assert len(row) < 30


def test_experts_drop_and_count_nothing():
    """A capacity that holds in training does not: a row's tokens are those that it has alone."""
    model = build("--moe.capacity_factor", "0.3", "--moe.aux_loss_scope", "global_batch")
    rows = generate(model, prompts(), max_new_tokens=16)
    for prompt, row in zip(prompts(), rows, strict=True):
        assert generate(model, [prompt], max_new_tokens=16) == [row]
    for layer in model.routed_layers().values():
        assert not any(total.any() for total in layer.pop_counters().values())


def test_training_continues_after_generation():
    """Nothing that generation made (layouts, say) stays behind as a tensor that autograd refuses."""
    model = build()
    generate(model, [[1] * 8], max_new_tokens=2)
    model.train()
    tokens = torch.ones(1, 8, dtype=torch.int64)
    model(tokens, labels=tokens).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 4, "no prompt to continue"),
        ([[1], []], 4, "Prompt 1 has no tokens"),
        ([[1, 50]], 4, "token ids from 1 to 50, but there are 50 tokens"),
        ([[-1]], 4, "token ids from -1 to -1"),
        ([[1]], 0, "max_new_tokens = 0 must be at least 1"),
    ],
)
def test_refusals(prompts, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("mixer", ["gated_deltanet", "attention"])
def test_a_compiled_step_generates_the_same_and_is_compiled_once(mixer, monkeypatch):
    """Not once a position; a second time when the number of rows changes, for any number."""
    torch._dynamo.reset()
    model = build("--model.layer_pattern", "L", "--model.mixer", mixer, "--model.num_layers", "1")
    ends = [12, 3, 12, 6, 9]

    def run(**options):
        taken = [0] * 5

        def has_ended(row, token):
            taken[row] += 1
            return taken[row] == ends[row]

        return generate(model, prompts(), max_new_tokens=12, has_ended=has_ended, **options)

    expected = run()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "backend", backend)
    assert run(compile=True) == expected
    assert 1 <= len(graphs) <= 3
    num_graphs = len(graphs)
    assert run(compile=True) == expected
    assert len(graphs) == num_graphs


def test_a_tokenizer_with_more_tokens_than_rows_is_refused():
    with pytest.raises(ValueError, match="The tokenizer has 51 tokens, but the model only 50 rows of its embedding"):
        generate(build(), prompts(), max_new_tokens=1, vocab_size=51)
