"""What blocks, embedding and head compute, against plain formulas in float64: norms, residuals, multipliers, parts."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.config.load import ConfigError, load_config
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.model.block import Block
from torchlmoe.model.decoder import build_on_meta, count_parameters
from torchlmoe.model.spec import ModelSpec

SMALL = "--model.dim 24 --model.num_heads 2 --model.layers.N.mlp dense --model.mlp_dim 20".split()
WEIGHTS = "mixer_stream_weight 1.5 mixer_branch_weight 0.25 mlp_stream_weight 0.75 mlp_branch_weight 3.0".split()
# A mixer alone, a feed-forward layer alone, both norm placements beside the ordinary one, and all multipliers.
EVERYTHING = """--model.layer_pattern MFNP --model.num_layers 4 --model.layers.M.mixer mamba2 --model.layers.M.mlp none
--model.layers.M.mixer_branch_weight 0.22 --model.layers.F.mixer none --model.layers.F.norm_placement post
--model.layers.N.norm_placement stream --model.layers.N.mixer_stream_weight 1.5 --model.layers.N.mlp_branch_weight 0.75
--model.layers.N.qk_norm true --model.layers.P.mixer attention --model.layers.P.mlp dense
--model.layers.P.norm_placement post --model.layers.P.mlp_options.activation relu2 --moe.activation relu2
--moe.latent_dim 12 --moe.num_shared_experts 1 --moe.num_experts 8 --moe.top_k 2 --moe.expert_dim 16
--model.zero_centered_norm true --model.embedding_multiplier 12.0 --model.logit_divisor 6.0""".split()


def build(*arguments, seed=0):
    model = build_on_meta(load_config([*SMALL, *arguments]), 50).to_empty(device="cpu").double()
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms too
        parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return model


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm_of(module):
    return lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight


@pytest.mark.parametrize("placement", ["pre", "post", "stream"])
def test_residual(placement):
    flags = [f"--model.layers.N.{name}={value}" for name, value in zip(WEIGHTS[::2], WEIGHTS[1::2], strict=True)]
    model = build("--model.layer_pattern", "N", f"--model.layers.N.norm_placement={placement}", *flags)
    block, sequence, x = model.blocks["0"], SequenceLayout.of_rows(2, 5), randn(2, 5, 24)
    expected = x
    for norm, part, stream_weight, branch_weight in (
        (norm_of(block.mixer_norm), block.mixer, 1.5, 0.25),
        (norm_of(block.feed_forward_norm), block.feed_forward, 0.75, 3.0),
    ):
        if placement == "pre":
            expected = stream_weight * expected + branch_weight * part(norm(expected), sequence=sequence)
        elif placement == "post":
            expected = stream_weight * expected + branch_weight * norm(part(expected, sequence=sequence))
        else:
            normed = norm(expected)
            expected = stream_weight * normed + branch_weight * part(normed, sequence=sequence)
    torch.testing.assert_close(block(x, sequence=sequence), expected)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_multipliers_of_embedding_and_logits(tied):
    """Logits, the loss chunk by chunk and both gradients of the output weight are those of the plain formula."""
    flags = ["--model.layer_pattern", "N", "--model.num_layers", "1", "--model.tie_embeddings", tied]
    flags += ["--model.embedding_multiplier", "12.0", "--model.logit_divisor", "6.0", "--model.loss_chunk_size", "4"]
    model, tokens = build(*flags), torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(3))
    weight = model.embedding.weight if tied == "true" else model.head.projection.weight
    x = model.blocks["0"](12 * model.embedding.weight[tokens], sequence=SequenceLayout.of_rows(2, 5))
    expected = norm_of(model.head.norm)(x) @ weight.mT / 6
    torch.testing.assert_close(model(tokens), expected)
    loss = F.cross_entropy(expected.flatten(0, 1), tokens.flatten(), reduction="sum")
    found = model(tokens, labels=tokens)
    torch.testing.assert_close(found, loss)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, parameters), torch.autograd.grad(loss, parameters))


def test_blocks_of_one_part():
    """Each has one norm, decoding equals the whole pass, and FLOPs and parameters are those of the parts."""
    model = build(*EVERYTHING).eval()
    parts = [sorted(name for name, _ in block.named_children()) for block in model.blocks.values()]
    both = ["feed_forward", "feed_forward_norm", "mixer", "mixer_norm"]
    assert parts == [both[2:], both[:2], both, both]
    assert model.blocks["1"].flops_per_token(8) == model.blocks["1"].feed_forward.flops_per_token()
    assert model.blocks["0"].flops_per_token(8) == model.blocks["0"].mixer.flops_per_token(8)
    moe = model.blocks["1"].feed_forward
    expert = 2 * 12 * 16  # up and down in the latent width
    assert moe.idle_parameters() == count_parameters(model) - count_parameters(model, active=True) == 6 * expert
    # Router, two experts, the shared one, to the latent and back.
    assert moe.flops_per_token() == 2 * (24 * 8 + 2 * expert + 2 * 24 * 16 + 2 * 24 * 12)
    tokens = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(3))
    cache, places = model.init_cache(2, 6), torch.arange(6).expand(2, 6)
    assert sorted(cache.keys()) == ["0", "2", "3"]
    whole = model(tokens)
    torch.testing.assert_close(model.next_logits(tokens[:, :4], places[:, :4], cache), whole[:, 3])
    for place in (4, 5):
        logits = model.next_logits(tokens[:, place, None], places[:, place, None], cache)
        torch.testing.assert_close(logits, whole[:, place])
    assert set(model.routed_layers()) == {"moe/1"}


@pytest.mark.parametrize("placement", ["pre", "post", "stream"])
@pytest.mark.parametrize("mlp", ["dense", "moe"])
def test_token_shift(placement, mlp):
    """The MLP reads x_t + (x_{t-1} - x_t) * weight, x its input without the shift, and nothing of another document."""
    flags = f"--model.layer_pattern F --model.layers.F.mixer none --model.layers.F.mlp {mlp} --model.num_layers 1"
    flags += f" --model.layers.F.mlp_token_shift true --model.layers.F.norm_placement {placement}"
    block = build(*flags.split()).eval().blocks["0"]
    bounds = torch.tensor([[0, 3, 4, 4, 9], [0, 1, 9, 9, 9]], dtype=torch.int32)
    sequence, x = SequenceLayout.of_packed_rows(bounds, 9), randn(1, 18, 24).requires_grad_()
    norm = norm_of(block.feed_forward_norm)
    given = x if placement == "post" else norm(x)
    first = [0, 3, 4, 9, 10]
    before = torch.stack([given[0, t - 1] if t not in first else torch.zeros(24).double() for t in range(18)])[None]
    shifted = given + (before - given) * block.feed_forward_shift.mix.weight
    branch = block.feed_forward(shifted, sequence=sequence)
    expected = {"pre": x + branch, "post": x + norm(branch), "stream": norm(x) + branch}[placement]
    y = block(x, sequence=sequence)
    torch.testing.assert_close(y, expected)
    for start, end in zip(first, [*first[1:], 18], strict=True):
        (gradient,) = torch.autograd.grad(y[0, start:end].sum(), x, retain_graph=True)
        assert gradient[0, start:end].any(-1).all()
        gradient[0, start:end] = 0
        assert not gradient.any()


def test_initial_token_shifts():
    """x_k of RWKV_CMix_x070 in each of four layers."""
    flags = "--model.layer_pattern LN --model.num_layers 4 --model.layers.N.mlp_token_shift true".split()
    model = build_on_meta(load_config([*SMALL, *flags]), 50).to_empty(device="cpu")
    model.init_weights(0)
    assert model.blocks["0"].feed_forward_shift is model.blocks["2"].feed_forward_shift is None
    ddd = torch.arange(24) / 24
    for index in (1, 3):
        found = model.blocks[str(index)].feed_forward_shift.mix.weight
        torch.testing.assert_close(found, 1.0 - ddd ** ((1 - index / 4) ** 4))


def test_model_without_any_mixer():
    model = build(*"--model.layer_pattern F --model.layers.F.mixer none --model.layers.F.mlp dense".split()).eval()
    tokens = torch.randint(50, (2, 3), generator=torch.Generator().manual_seed(3))
    cache = model.init_cache(2, 3)
    found = model.next_logits(tokens, torch.arange(3).expand(2, 3), cache)
    torch.testing.assert_close(found, model(tokens)[:, -1])
    # No token sees another.
    torch.testing.assert_close(model(tokens[:, 2:])[:, 0], found)


def test_zero_centered_norms():
    """Logits are those of ordinary norms whose weights are greater by one, of q and k too."""
    flags = "--model.layer_pattern N --model.num_layers 2 --model.layers.N.qk_norm true".split()
    ordinary, centered = build(*flags), build(*flags, "--model.zero_centered_norm", "true")
    weights = {name: x - 1 if name.endswith("norm.weight") else x for name, x in ordinary.state_dict().items()}
    assert sum(name.endswith("norm.weight") for name in weights) == 9
    centered.load_state_dict(weights)
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(centered(tokens), ordinary(tokens))
    fresh = build_on_meta(load_config([*SMALL, *flags, "--model.zero_centered_norm", "true"]), 50)
    fresh.to_empty(device="cpu").init_weights(0)
    assert not any(x.any() for name, x in fresh.state_dict().items() if name.endswith("norm.weight"))


@pytest.mark.parametrize("bias", ["true", "false"])
def test_layer_norms(bias):
    """Those of embedding, blocks and head, with a weight and, if asked for, a bias."""
    flags = "--model.layer_pattern N --model.num_layers 1 --model.norm layer --model.embedding_norm true".split()
    model = build(*flags, "--model.norm_bias", bias, "--model.embedding_multiplier", "12.0")
    block, sequence, tokens = model.blocks["0"], SequenceLayout.of_rows(2, 5), torch.arange(10).view(2, 5)
    assert sum(name.endswith("norm.bias") for name, _ in model.named_parameters()) == (4 if bias == "true" else 0)

    def normed(x, norm):
        centered = x - x.mean(-1, keepdim=True)
        y = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        return y + norm.bias if bias == "true" else y

    x = normed(12 * model.embedding.weight[tokens], model.embedding_norm)
    x = x + block.mixer(normed(x, block.mixer_norm), sequence=sequence)
    x = x + block.feed_forward(normed(x, block.feed_forward_norm), sequence=sequence)
    torch.testing.assert_close(model(tokens), normed(x, model.head.norm) @ model.head.projection.weight.mT)


def test_what_does_not_fit_is_refused():
    letter = "model.layers.L"
    refused = {
        f"--{letter}.mixer none --{letter}.mlp none": f"[{letter}] has neither a mixer nor an mlp; give it one",
        f"--{letter}.mixer none --{letter}.mixer_branch_weight 2.0": "mixer_branch_weight has no effect with mixer =",
        f"--{letter}.mlp none --{letter}.mlp_stream_weight 2.0": "mlp_stream_weight has no effect with mlp = 'none'",
        f"--{letter}.norm_placement after": "norm_placement = 'after' is not valid: it should be 'pre', 'post' or",
        f"--{letter}.norm_placment post": "norm_placment is not a setting; the nearest is norm_placement",
        f"--{letter}.mlp_branch_weight 0.0": "mlp_branch_weight = 0.0 is not valid",
        f"--{letter}.mixer none --{letter}.conv_size 4": "conv_size is not a setting",
        "--model.logit_divisor 0.0": "model.logit_divisor = 0.0 is not valid",
        f"--{letter}.mlp none --{letter}.mlp_token_shift true": "mlp_token_shift has no effect with mlp = 'none'",
        "--model.norm_bias false": "norm_bias = false has no effect with model.norm",
        "--model.norm layer --model.zero_centered_norm true": "zero_centered_norm = true has no effect with model.norm",
        "--moe.activation gelu": "moe.activation = 'gelu' is not valid: it should be 'swiglu' or 'relu2'",
        f"--{letter}.mlp dense --{letter}.mlp_options.activation gelu": "activation = 'gelu' is not valid",
    }
    for arguments, message in refused.items():
        with pytest.raises(ConfigError) as error:
            load_config(arguments.split())
        assert message in str(error.value), arguments
    with pytest.raises(ValueError, match="it has neither"):
        Block(ModelSpec(4, 4, ()), None, None)
