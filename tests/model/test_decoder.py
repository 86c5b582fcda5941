"""The whole model: documents do not meet, initial weights, parameter counts of the paper, refusals."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from torchlmoe.config.load import load_config
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS
from torchlmoe.model.batch import counting
from torchlmoe.model.decoder import Decoder, build_on_meta, count_parameters

SMALL = """--model.dim 32 --model.num_heads 2 --model.num_layers 2 --model.vocab_size 50
--moe.num_experts 4 --moe.top_k 2 --moe.expert_dim 16 --model.init_std 0.3""".split()
# Two rows of 24 tokens: documents of 10, 1 and 13 tokens, and one of 24.
BOUNDS = torch.tensor([[0, 10, 11, 24, 24], [0, 24, 24, 24, 24]], dtype=torch.int32)
DOCUMENTS = [(0, 0, 10), (0, 10, 11), (0, 11, 24), (1, 0, 24)]


def build(*arguments, dtype=torch.float64, seed=0):
    config = load_config([*SMALL, *arguments])
    model = build_on_meta(config, config.model.vocab_size).to(dtype).to_empty(device="cpu")
    model.init_weights(seed)
    return model


def tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mlp", ["moe", "dense"])
def test_documents_do_not_meet(mixer, mlp):
    """Of one document's logits in another's embeddings the gradient is exactly zero; packed logits = those alone."""
    model = build("--model.layer_pattern", "L", "--model.mixer", mixer, "--model.layers.L.mlp", mlp)
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, x: embedded.append(x) or x)
    batch = tokens(2, 24)
    logits = model(batch, BOUNDS)
    for row, start, end in DOCUMENTS:
        loss = logits[row, start:end].square().sum()
        (gradient,) = torch.autograd.grad(loss, embedded[0], retain_graph=True)
        own = torch.zeros(48, dtype=torch.bool)
        own[row * 24 + start : row * 24 + end] = True
        assert gradient[0, own].any(-1).all()
        assert not gradient[0, ~own].any()
        alone = model(batch[row : row + 1, start:end])
        torch.testing.assert_close(logits[row : row + 1, start:end], alone, rtol=1e-10, atol=1e-10)


def test_loss_is_that_of_the_logits():
    model = build()
    batch, labels = tokens(2, 24), tokens(2, 24).roll(1, 1)
    labels[0, :5] = -100
    expected = F.cross_entropy(model(batch, BOUNDS).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(batch, BOUNDS, labels), expected)


def test_padding_is_what_no_label_depends_on():
    """Documents as of BOUNDS: a prompt without labels counts, what comes after the last label does not."""
    labels = torch.full((2, 24), -100)
    labels[0, 5:8] = labels[1, 20] = 3  # none in the documents of 1 and 13 tokens
    expected = torch.zeros(2, 24, dtype=torch.bool)
    expected[0, :8] = expected[1, :21] = True
    packed = counting(SequenceLayout.of_packed_rows(BOUNDS, 24), labels != -100)
    assert torch.equal(packed.share.counted.view(2, 24), expected)
    assert torch.equal(torch.cat([packed.span(i, 3).share.counted for i in range(3)], 1), packed.share.counted)
    expected[0, 5:8] = False
    labels[0, 5:8] = -100
    rows = counting(SequenceLayout.of_rows(2, 24), labels != -100)
    assert torch.equal(rows.share.counted, expected & torch.tensor([[False], [True]]))


@pytest.mark.parametrize(
    "settings",
    [
        "--moe.z_loss_weight 0.1 --moe.capacity_factor 0.7",
        "--moe.aux_loss_scope global_batch --moe.num_shared_experts 1",
        "--moe.balance loss_free --model.mixer mom",
    ],
)
def test_padding_does_not_count(settings):
    """Other tokens in place of padding change neither loss nor gradients nor loads."""
    model = build(*settings.split())
    batch, labels = tokens(2, 24), tokens(2, 24).roll(1, 1)
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[0, 11:] = padding[1, 20:] = True  # a separate document, and the end of one
    labels[padding] = -100
    results = []
    for shift in (0, 17):
        model.zero_grad()
        loss = model(torch.where(padding, (batch + shift) % 50, batch), BOUNDS, labels)
        loss.backward()
        counters = {name: layer.pop_counters() for name, layer in model.routed_layers().items()}
        for counts in counters.values():
            assert counts["counts"].sum() == 2 * (~padding).sum()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((loss.detach(), gradients, counters))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    if "capacity" in settings:
        assert all(counts["dropped"] > 0 for counts in results[0][2].values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_tokens_have_no_loss_and_zero_gradients(mixer):
    model = build("--model.layer_pattern", "L", "--model.mixer", mixer)
    for shape, bounds in (((2, 0), None), ((2, 0), torch.zeros(2, 3, dtype=torch.int32)), ((0, 24), None)):
        model.zero_grad()
        nll = model(tokens(*shape), bounds, tokens(*shape))
        nll.backward()
        assert nll == 0
        assert not any(parameter.grad.any() for parameter in model.parameters())
        assert not any(x.any() for layer in model.routed_layers().values() for x in layer.pop_counters().values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast(mixer):
    model, batch = build("--model.layer_pattern", "L", "--model.mixer", mixer, dtype=torch.float32), tokens(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        nll = model(batch, BOUNDS, batch)
    nll.backward()
    torch.testing.assert_close(nll, model(batch, BOUNDS, batch), rtol=1e-2, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_trains_without_values(mixer):
    config = load_config([*SMALL, "--model.layer_pattern", "L", "--model.mixer", mixer, "--model.num_layers", "1"])
    for device, mode, packed in (("meta", nullcontext(), False), ("cpu", FakeTensorMode(), True)):
        with mode, torch.device(device):
            model = Decoder(config.spec(50))
            batch = torch.zeros(2, 24, dtype=torch.int64)
            model(batch, torch.zeros(2, 5, dtype=torch.int32) if packed else None, batch).backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (
            [[0, 10, 24], [1, 10, 24]],
            "document_bounds must rise from 0 to the number of tokens, 24; it is \\[1, 10, 24\\]",
        ),
        ([[0, 10, 23], [0, 10, 24]], "document_bounds must rise from 0"),
        ([[0, 10, 24], [0, 10, 25]], "document_bounds must rise from 0"),
        ([[0, 10, 9, 24], [0, 10, 24, 24]], "document_bounds must rise from 0"),
        ([[0, -1, 24], [0, 10, 24]], "document_bounds must rise from 0"),
        ([[0, 24]], "document_bounds has 1 rows and tokens have 2; give bounds for every row"),
        ([0, 24], "document_bounds has shape \\[2\\]; it must be \\[B, max_docs \\+ 1\\]"),
    ],
)
def test_bounds_rise_from_none_to_all_tokens(bounds, message):
    with pytest.raises(ValueError, match=message):
        build()(tokens(2, 24), torch.tensor(bounds, dtype=torch.int32))


def test_weights_depend_on_seed_and_name_only():
    """Not on dtype, nor on which other layers there are."""
    model, shallow = build(), build("--model.num_layers", "1")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), build().parameters(), strict=True))
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    for p, q in zip(model.parameters(), build(dtype=torch.float32).parameters(), strict=True):
        assert torch.equal(p.float(), q)
    other = build(seed=1)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)
    first, second = (model.get_submodule(f"blocks.{index}.feed_forward.experts").down_proj for index in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()


@pytest.mark.parametrize(
    ("flavor", "mixer", "expected"),
    [  # billions: total without and with embeddings, active without and with
        ("a0.3b_2b", "attention", (2.17, 2.48, 0.32, 0.63)),
        ("a0.3b_2b", "gated_deltanet", (2.18, 2.49, 0.33, 0.64)),
        ("a1b_7b", "attention", (6.71, 7.34, 1.08, 1.70)),
        ("a1b_7b", "gated_deltanet", (6.78, 7.40, 1.14, 1.77)),  # 1.765 with the router, 1.763 without
    ],
)
def test_parameter_counts_of_the_paper(flavor, mixer, expected):
    """Of the meta-device model, and of a formula over the settings, against the paper's sizes."""
    config = load_config(["--model.flavor", flavor, "--model.mixer", mixer])
    settings, moe = config.model, config.moe
    model = build_on_meta(config, settings.vocab_size)
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = [
        count_parameters(model, active=active, embeddings=embeddings)
        for active, embeddings in itertools.product((False, True), repeat=2)
    ]
    assert [round(count / 1e9, 2) for count in counts] == list(expected)

    per_mixer = 4 * settings.dim**2
    if mixer == "gated_deltanet":  # a fifth projection; two gates a head, three convolutions, decay and norm
        heads = settings.num_heads
        per_mixer = 5 * settings.dim**2 + 2 * settings.dim * heads + 3 * 4 * settings.dim
        per_mixer += 2 * heads + settings.dim // heads
    expert = 3 * settings.dim * moe.expert_dim
    outer = 2 * settings.vocab_size * settings.dim
    formula = []
    for experts in (moe.num_experts, moe.top_k):
        block = per_mixer + experts * expert + settings.dim * moe.num_experts + 2 * settings.dim
        body = settings.num_layers * block + settings.dim
        formula += [body, body + outer]
    assert counts == formula


def test_tied_embeddings_are_one_parameter():
    tied, untied = build("--model.tie_embeddings", "true"), build()
    assert untied.embedding.weight.numel() == count_parameters(untied) - count_parameters(tied)


def test_pattern_places_the_mixers():
    config = load_config(["--model.num_layers", "5", "--model.layer_pattern", "LLN", "--model.mixer", "bla"])
    model = build_on_meta(config, 10)
    mixers = [type(block.mixer) for block in model.blocks.values()]
    assert mixers == [MIXERS[name] for name in ("bla", "bla", "attention", "bla", "bla")]


def test_any_letter_may_name_a_kind_of_block():
    arguments = (
        "--model.layer_pattern GD --model.layers.G.mixer gla --model.layers.D.mixer bla --model.layers.D.mlp dense"
    )
    model = build_on_meta(load_config(arguments.split()), 10)
    assert list(model.routed_layers()) == ["moe/0", "moe/2"]


def test_dense_blocks_of_a_narrow_model_have_a_width():
    model = build_on_meta(load_config("--model.dim 2 --model.num_heads 1 --model.layers.L.mlp dense".split()), 10)
    assert model.blocks["0"].feed_forward.gate_proj.out_features == 16


def test_every_router_is_counted():
    """Mixtures of memories beside mixtures of experts; a dense block has neither."""
    arguments = "--model.layer_pattern MLN --model.num_layers 3 --model.layers.M.mixer mom --model.layers.L.mlp dense"
    model = build(*arguments.split())
    batch = tokens(2, 24)
    model(batch, BOUNDS, batch).backward()
    counted = {name: int(layer.pop_counters()["counts"].sum()) for name, layer in model.routed_layers().items()}
    assert counted == {"mom/0": 2 * 48, "moe/0": 2 * 48, "moe/2": 2 * 48}


@pytest.mark.parametrize("mixer", ["rwkv7", "mom"])
def test_a_mixer_hands_a_tensor_on_to_its_later_layers(mixer):
    """RWKV-7's first values, past a block with another mixer; only the first layer has no use for them."""
    inner = "--model.layers.L.inner rwkv7 --model.layers.L.single_kv_proj true".split() if mixer == "mom" else []
    model = build(*f"--model.layer_pattern NLNL --model.mixer {mixer} --model.num_layers 4".split(), *inner)
    first, later = (
        block.mixer.inner if mixer == "mom" else block.mixer for block in (model.blocks["1"], model.blocks["3"])
    )
    assert [first.place.first, later.place.first, later.place.index] == [True, False, 3]
    assert first.first_value_proj is None
    seen = []
    for layer in (first, later):
        layer.register_forward_hook(
            lambda module, args, kwargs, y: seen.append((kwargs["shared"], y[1])), with_kwargs=True
        )
    model(tokens(2, 24), BOUNDS).sum().backward()
    (given_first, from_first), (received, passed_on) = seen
    assert not given_first.any()
    assert torch.equal(received, from_first)
    assert torch.equal(passed_on, received)
    assert from_first.any()
    with pytest.raises(ValueError, match="needs `shared`"):
        later(torch.zeros(1, 3, 32, dtype=torch.float64), sequence=SequenceLayout.of_rows(1, 3))


def test_a_letter_has_a_parameter_in_common():
    """HGRN2's lower bounds (arXiv 2404.07904): zero in the first layer, then sums of a softmax over the layers."""
    model = build(*"--model.layer_pattern LNL --model.mixer hgrn2 --model.num_layers 6".split())
    weight = model.common["L"].weight
    assert weight.shape == (4 * 32,)  # a vector, so that it has no weight decay
    with torch.no_grad():
        weight.uniform_(-2, 2)
    share = weight.view(4, 32).exp() / weight.view(4, 32).exp().sum(0)
    bounds = [torch.zeros_like(share[0]), share[1], share[1] + share[2], share[1:].sum(0)]
    seen = []
    for index in ("0", "2", "3", "5"):
        model.blocks[index].mixer.register_forward_hook(
            lambda module, args, kwargs, y: seen.append(kwargs["common"]), with_kwargs=True
        )
    model(tokens(2, 24), BOUNDS).square().sum().backward()
    for found, expected in zip(seen, bounds, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert weight.grad.abs().min() > 0


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="top_k = 5"):
        build("--moe.top_k", "5")
    with pytest.raises(ValueError, match="dim = 32 cannot be split into num_heads = 5"):
        build("--model.num_heads", "5")
