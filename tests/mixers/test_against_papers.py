"""Mixers against their papers' formulas, written out token by token or as masked attention, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.base import Place


def build(name, **options):
    mixer = MIXERS[name](32, num_heads=4, init_std=0.3, **options).double()
    with named_draws(mixer, seed=1):
        mixer.init_weights()
    return mixer


def inputs():
    return torch.randn(2, 70, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_gla_token_loop():
    """arXiv 2312.06635, equations 3 and 4, and the layer of its section 4.4."""
    mixer, x = build("gla"), inputs()
    with torch.no_grad():
        mixer.decay.bias.uniform_(-1, 1)
    q, k, v, gate = (
        F.linear(x, p.weight).view(2, 70, 4, -1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj)
    )
    low_rank = F.linear(F.linear(x, mixer.decay_proj.down_proj.weight), mixer.decay_proj.up_proj.weight)
    alpha = torch.sigmoid(low_rank + mixer.decay.bias).pow(1 / 16).view(2, 70, 4, -1)
    state = torch.zeros(2, 4, k.shape[-1], v.shape[-1], dtype=torch.float64)
    outputs = []
    for t in range(70):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] / k.shape[-1] ** 0.5, state))
    o = rms(torch.stack(outputs, 1)) * gate * torch.sigmoid(gate)
    expected = F.linear(o.flatten(2), mixer.o_proj.weight)
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("feature_map", "normalizer"),
    [(name, False) for name in ("identity", "elu", "relu", "silu", "softmax")]
    + [(name, True) for name in ("elu", "relu", "softmax")],
)
def test_bla_masked_attention(feature_map, normalizer):
    """arXiv 2006.16236, equation 9 (with the normaliser), as the masked product of q and k."""
    mixer, x = build("bla", feature_map=feature_map, normalizer=normalizer), inputs()
    phi = {
        "identity": lambda z: z,
        "elu": lambda z: torch.where(z > 0, z + 1, z.exp()),
        "relu": lambda z: z.clamp_min(0),
        "silu": lambda z: z * torch.sigmoid(z),
        "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
    }[feature_map]
    q, k, v = (
        F.linear(x, p.weight).view(2, 70, 4, 8).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    weights = (phi(q) @ phi(k).mT).tril() * 8**-0.5
    o = weights @ v
    if normalizer:
        o = o / (weights.sum(-1, keepdim=True) + 1e-6)
    expected = F.linear(rms(o).transpose(1, 2).flatten(2), mixer.o_proj.weight)
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


def per_head(x, *projections):
    """x [2, 70, 32] -> a [2, 4, 70, width] for each projection."""
    return [F.linear(x, projection.weight).view(2, 70, 4, -1).transpose(1, 2) for projection in projections]


def assert_output(mixer, x, o, gate=None):
    """o [2, 4, 70, V], normalised as the paper has it, through the output gate and projection, equals the mixer's."""
    if gate is not None:
        o = o * gate * torch.sigmoid(gate)
    expected = F.linear(o.transpose(1, 2).flatten(2), mixer.o_proj.weight)
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


def test_retention_masked_attention():
    """arXiv 2307.08621, equations 5 and 8: complex rotation, causal decay, norm per head, swish gate."""
    mixer, x = build("retention"), inputs()
    q, k, v, gate = per_head(x, mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj)
    angle = torch.arange(70)[:, None] * 10_000 ** -(torch.arange(4, dtype=torch.float64) / 4)
    q, k = (torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle) for x in (q, k))
    distance = (torch.arange(70)[:, None] - torch.arange(70)).double()
    gamma = 1 - 2 ** -(5 + torch.arange(4, dtype=torch.float64))
    weights = (q @ k.mH).real * 8**-0.5 * (gamma[:, None, None] ** distance).tril()
    assert_output(mixer, x, rms(weights @ v), gate)


def test_gateloop_token_loop():
    """arXiv 2311.01927, equations 4 to 6: a complex state, whose transition has magnitude and phase of the input."""
    mixer, x = build("gateloop", expand_v=1.5), inputs()
    with torch.no_grad():
        mixer.decay.bias.uniform_(-1, 1)
    q, k, v, gate, phase = per_head(x, mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj, mixer.phase_proj)
    magnitude = torch.sigmoid(F.linear(x, mixer.decay_proj.weight, mixer.decay.bias)).view(2, 70, 4, 4).transpose(1, 2)
    q, k = (torch.complex(x[..., :4], x[..., 4:]) for x in (q, k))
    transition = torch.polar(magnitude, phase)
    state = torch.zeros(2, 4, 4, 12, dtype=torch.complex128)
    outputs = []
    for t in range(70):
        state = transition[:, :, t, :, None] * state + k[:, :, t, :, None].conj() * v[:, :, t, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state).real * 8**-0.5)
    assert_output(mixer, x, rms(torch.stack(outputs, 2)), gate)


@pytest.mark.parametrize("bounded", [False, True])
def test_hgrn2_token_loop(bounded):
    """arXiv 2404.07904, equation 7, with a lower bound on the forget gate."""
    mixer, x = build("hgrn2", expand_k=1.5), inputs()
    q, f, v = per_head(x, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    bound = torch.rand(48, dtype=torch.float64) * 0.9 + 0.05 if bounded else torch.zeros(48, dtype=torch.float64)
    forget = bound.view(4, 1, 12) + (1 - bound.view(4, 1, 12)) * torch.sigmoid(f)
    state = torch.zeros(2, 4, 12, 8, dtype=torch.float64)
    outputs = []
    for t in range(70):
        f_t = forget[:, :, t, :, None]
        state = f_t * state + (1 - f_t) * v[:, :, t, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t] * torch.sigmoid(q[:, :, t]) / 12**0.5, state))
    o = rms(torch.stack(outputs, 2).transpose(1, 2).flatten(2))
    expected = F.linear(o, mixer.o_proj.weight)
    y = mixer(x, sequence=SequenceLayout.of_rows(2, 70), common=bound.requires_grad_())
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    assert torch.autograd.grad(y.square().sum(), bound)[0].isfinite().all()


def test_hgrn2_bound_that_rounds_to_one():
    """Three of four layers share all of the softmax: outputs stay, and the gradient of the bounds is finite."""
    mixer, x = build("hgrn2"), inputs()
    bounds = mixer.common(4).double()
    assert bounds.weight.dim() == 1  # so that it has no weight decay
    with torch.no_grad():
        bounds.weight.fill_(0.0).view(4, -1)[0] = -40.0
    y = mixer(x, sequence=SequenceLayout.of_rows(2, 70), common=bounds()[3])
    y.square().sum().backward()
    assert (bounds()[3] == 1).all()
    assert y.isfinite().all()
    assert bounds.weight.grad.isfinite().all()


def test_based_taylor_attention():
    """arXiv 2402.18668, section 4.1: weights 1 + z + z^2 / 2, normalised."""
    mixer, x = build("based", feature_dim=6), inputs()
    q, k, v = per_head(x, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    z = q @ k.mT / 6**0.5
    weights = (1 + z + z.square() / 2).tril()
    assert_output(mixer, x, weights @ v / (weights.sum(-1, keepdim=True) + 1e-6))


def test_rebased_quadratic_attention():
    """arXiv 2402.10644, equation 4: the square of the product of normalised, scaled and shifted q and k, normalised."""
    mixer, x = build("rebased", feature_dim=6), inputs()
    with torch.no_grad():
        mixer.feature_norm.weight.uniform_(0.5, 1.5)
        mixer.feature_norm.bias.uniform_(-1, 1)
    q, k, v = per_head(x, mixer.q_proj, mixer.k_proj, mixer.v_proj)

    def phi(x):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * mixer.feature_norm.weight + mixer.feature_norm.bias

    weights = ((phi(q) @ phi(k).mT).square() / 6).tril()
    assert_output(mixer, x, weights @ v / (weights.sum(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize(
    ("dtype", "length", "tolerance", "tolerance_of_a_token"),
    [(torch.float32, 1, 1e-5, 1e-3), (torch.float32, 2, 1e-5, 1e-3), (torch.bfloat16, 2, 3e-2, 1.0)],
)
def test_rebased_where_weights_are_near_zero(dtype, length, tolerance, tolerance_of_a_token):
    """Early tokens whose q and k are nearly orthogonal: the sum of weights is the remainder of canceling features."""
    x = torch.randn(3000, length, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for kind in (torch.float64, dtype):
        mixer = MIXERS["rebased"](64, num_heads=4, init_std=0.1)
        with named_draws(mixer, seed=0):
            mixer.init_weights()
        with torch.no_grad():
            outputs.append(mixer.to(kind)(x.to(kind), sequence=SequenceLayout.of_rows(3000, length)).double())
    expected, y = outputs
    assert (y - expected).norm() <= tolerance * expected.norm()
    assert ((y - expected).norm(dim=-1) / expected.norm(dim=-1)).max() <= tolerance_of_a_token


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_deltanet_token_loop(negative_eigenvalues):
    """arXiv 2406.06484, equation 2 and the layer of its section 3.4."""
    mixer, x = build("deltanet", expand_v=1.5, negative_eigenvalues=negative_eigenvalues), inputs()

    def convolved(projection, convolution):
        padded = F.pad(F.linear(x, projection.weight).mT, (3, 0))
        y = F.conv1d(padded, convolution.weight[:, None], groups=padded.shape[1]).mT
        return (y * torch.sigmoid(y)).view(2, 70, 4, -1).transpose(1, 2)

    q, k, v = (convolved(getattr(mixer, f"{name}_proj"), getattr(mixer, f"{name}_conv")) for name in ("q", "k", "v"))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = torch.sigmoid(per_head(x, mixer.b_proj)[0]) * (2 if negative_eigenvalues else 1)
    state = torch.zeros(2, 4, 8, 12, dtype=torch.float64)
    outputs = []
    for t in range(70):
        k_t, old = k[:, :, t], torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
        new = beta[:, :, t] * v[:, :, t] + (1 - beta[:, :, t]) * old
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, new - old)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t] / 8**0.5, state))
    assert_output(mixer, x, rms(torch.stack(outputs, 2)))


def randomize(mixer):
    """Vectors and biases too: at their starting values some would not show."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return mixer


def heads(x):
    return x.view(*x.shape[:2], 4, -1)


def projected(mixer, for_q, for_k, for_v):
    return for_q @ mixer.q_proj.weight.T, for_k @ mixer.k_proj.weight.T, for_v @ mixer.v_proj.weight.T


def head_norm(o, norm):
    """o [B, T, 4, V]: group norm, its epsilon 64e-5 for the authors' heads of 64."""
    return F.group_norm(o.flatten(0, 1).flatten(1), 4, norm.weight, norm.bias, 1e-5 * o.shape[-1]).view(
        *o.shape[:2], -1
    )


def low_rank(x, projection, activation=lambda z: z):
    return activation(x @ projection.down_proj.weight.T) @ projection.up_proj.weight.T


def test_rwkv6_token_loop():
    """arXiv 2404.05892, section 4, as in the authors' RWKV_Tmix_x060."""
    mixer, x = randomize(build("rwkv6", mix_rank=4, decay_rank=6)), inputs()
    before = torch.cat([torch.zeros(2, 1, 32, dtype=torch.float64), x[:, :-1]], 1)

    def lerp(weight):
        return x + (before - x) * weight

    hidden = torch.tanh(lerp(mixer.mix_x.weight) @ mixer.mix_down_proj.weight.T).view(2, 70, 5, 4)
    mixed = {
        name: lerp(mixer.mix[name].weight + hidden[:, :, index] @ mixer.mix_up_proj[name].weight.T)
        for index, name in enumerate("rkvgw")
    }
    r, k, v = (heads(z) for z in projected(mixer, *(mixed[name] for name in "rkv")))
    w = heads(torch.exp(-torch.exp(mixer.decay.bias + low_rank(mixed["w"], mixer.decay_proj, torch.tanh))))
    u = mixer.bonus.view(4, 8)
    state, outputs = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
    for t in range(70):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state + u[..., None] * kv))
        state = w[:, t, :, :, None] * state + kv
    gate = mixed["g"] @ mixer.gate_proj.weight.T
    expected = (head_norm(torch.stack(outputs, 1), mixer.norm) * F.silu(gate)) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


def test_rwkv6_value_mixture_starts_as_the_authors():
    """time_maa_v of RWKV_Tmix_x060 in the third of four layers."""
    mixer = build("rwkv6", place=Place(2, 4))
    ddd = torch.arange(32, dtype=torch.float64) / 32
    torch.testing.assert_close(mixer.mix["v"].weight.detach(), 1.0 - (ddd**0.5 + 0.3 * 2 / 3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixer.mix["k"].weight.detach(), 1.0 - ddd**0.5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_rwkv7_token_loop(first):
    """arXiv 2503.14456, section 4, as in the authors' RWKV_Tmix_x070; a later layer mixes in the first one's values."""
    mixer = randomize(build("rwkv7", place=Place(0 if first else 2, 4, first), decay_rank=4, value_rank=3))
    x = inputs()
    shared = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = torch.cat([torch.zeros(2, 1, 32, dtype=torch.float64), x[:, :-1]], 1)
    mixed = {name: x + (before - x) * mix.weight for name, mix in mixer.mix.items()}
    r, k, v = projected(mixer, *(mixed[name] for name in "rkv"))
    if not first:
        share = torch.sigmoid(mixer.first_value_bias + low_rank(mixed["v"], mixer.first_value_proj))
        v = v + (shared - v) * share
    first_value = v if first else shared
    decay = mixer.decay.bias + low_rank(mixed["w"], mixer.decay_proj, torch.tanh)
    w = torch.exp(-0.6065306597126334 * torch.sigmoid(decay))
    a = torch.sigmoid(mixer.rate_bias + low_rank(mixed["a"], mixer.rate_proj))
    kk = F.normalize(heads(k * mixer.erase_scale), dim=-1)
    k = k * (1 + (a - 1) * mixer.rate_share)
    r, w, k, v, a = map(heads, (r, w, k, v, a))
    state, outputs = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
    for t in range(70):
        read = torch.einsum("bhk,bhkv->bhv", -kk[:, t], state)
        state = w[:, t, :, :, None] * state + (kk * a)[:, t, :, :, None] * read[:, :, None]
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
    o = head_norm(torch.stack(outputs, 1), mixer.norm)
    o = o + ((r * k * mixer.bonus.view(4, 8)).sum(-1, keepdim=True) * v).flatten(2)
    expected = (o * low_rank(mixed["g"], mixer.gate_proj, torch.sigmoid)) @ mixer.o_proj.weight.T
    y, returned = mixer(x, sequence=SequenceLayout.of_rows(2, 70), shared=shared)
    torch.testing.assert_close(returned, first_value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)


def test_gsa_token_loop():
    """arXiv 2409.07146: a token writes to slot i with weight 1 - alpha_i and reads the slots by softmax."""
    mixer, x = randomize(build("gsa", num_slots=6, gate_normalizer=2.0)), inputs()
    q, k, v = (F.silu(heads(z)) for z in projected(mixer, x, x, x))
    alpha = torch.sigmoid(heads(x @ mixer.slot_proj.weight.T + mixer.decay.bias)).sqrt()
    keys, values = (torch.zeros(2, 4, 6, 8, dtype=torch.float64) for _ in "kv")
    outputs = []
    for t in range(70):
        keep = alpha[:, t, :, :, None]
        keys = keep * keys + (1 - keep) * k[:, t, :, None]
        values = keep * values + (1 - keep) * v[:, t, :, None]
        weight = (keys @ q[:, t, :, :, None]).squeeze(-1).softmax(-1)
        outputs.append((weight[..., None] * values).sum(-2))
    o = F.silu(torch.stack(outputs, 1).flatten(2))
    expected = (rms(o) * mixer.norm.weight) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gate", ["rank_one", "full"])
def test_gfw_token_loop(gate):
    """arXiv 2210.04243: the state times a gate, of rank one or full, element by element."""
    mixer, x = randomize(build("gfw", expand_k=0.5, gate=gate)), inputs()
    q, k, v = (heads(z) for z in projected(mixer, x, x, x))
    if gate == "full":
        gates = torch.sigmoid(low_rank(x, mixer.gate_proj) + mixer.decay.bias).view(2, 70, 4, 4, 8)
    else:
        f = torch.sigmoid(heads(x @ mixer.key_gate_proj.weight.T + mixer.key_decay.bias))
        z = torch.sigmoid(heads(x @ mixer.value_gate_proj.weight.T + mixer.value_decay.bias))
        gates = f[..., None] * z[..., None, :]
    state, outputs = torch.zeros(2, 4, 4, 8, dtype=torch.float64), []
    for t in range(70):
        state = gates[:, t] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state).squeeze(-2) / 2)
    o = rms(torch.stack(outputs, 1)) * mixer.norm.weight
    expected = o.flatten(2) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("single_kv_proj", [True, False])
@pytest.mark.parametrize("shared_memory", [True, False])
def test_mom_token_loop(shared_memory, single_kv_proj):
    """arXiv 2502.13685, section 3: a state per memory, updated where the router sends the token, read as a mixture."""
    options = dict(inner="gla", shared_memory=shared_memory, single_kv_proj=single_kv_proj)
    mixer, x = randomize(build("mom", **options)), inputs()
    inner = mixer.inner
    matrices = (w.weight.expand(4 + shared_memory, -1, -1) for w in (inner.k_proj, inner.v_proj))
    k, v = ([heads(x @ matrix.T) for matrix in of_memories] for of_memories in matrices)
    q = heads(x @ inner.q_proj.weight.T)
    alpha = heads(torch.sigmoid(low_rank(x, inner.decay_proj) + inner.decay.bias).pow(1 / 16))
    score, chosen = (x @ mixer.router.weight.T).softmax(-1).topk(2)
    share = score / score.sum(-1, keepdim=True)
    outputs = torch.zeros(2, 70, 4, 8, dtype=torch.float64)
    for row in range(2):
        states = torch.zeros(5, 4, 4, 8, dtype=torch.float64)
        for t in range(70):
            weights = dict(zip(chosen[row, t].tolist(), share[row, t], strict=True)) | (
                {4: 1.0} if shared_memory else {}
            )
            states = states.clone()
            for memory in weights:
                kv = k[memory][row, t, :, :, None] * v[memory][row, t, :, None]
                states[memory] = alpha[row, t, :, :, None] * states[memory] + kv
            mixture = sum(weight * states[memory] for memory, weight in weights.items())
            outputs[row, t] = torch.einsum("hk,hkv->hv", q[row, t] / 2, mixture)
    o = rms(outputs) * inner.norm.weight * F.silu(heads(x @ inner.gate_proj.weight.T))
    expected = o.flatten(2) @ inner.o_proj.weight.T
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


def test_mom_of_gated_delta_rules():
    """Each memory alone, over the tokens that it gets: separate projections of k, v, beta and decay; convolutions."""
    mixer, x = randomize(build("mom")), inputs()
    inner, outputs = mixer.inner, torch.zeros(2, 70, 4, 8, dtype=torch.float64)
    score, chosen = (x @ mixer.router.weight.T).softmax(-1).topk(2)
    share = torch.zeros(2, 70, 5, dtype=torch.float64).scatter(2, chosen, score / score.sum(-1, keepdim=True))
    share[..., 4] = 1.0

    def convolved(z, convolution):
        return F.silu(F.conv1d(F.pad(z.T, (3, 0)), convolution.weight[:, None], groups=32).T).view(-1, 4, 8)

    def unit(z):
        return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    for row, memory in itertools.product(range(2), range(5)):
        tokens = share[row, :, memory].nonzero()[:, 0]
        z = x[row, tokens]
        q = unit(convolved(z @ inner.q_proj.weight.T, inner.q_conv))
        k = unit(convolved(z @ inner.k_proj.weight[memory].T, inner.k_conv))
        v = convolved(z @ inner.v_proj.weight[memory].T, inner.v_conv)
        beta = torch.sigmoid(z @ inner.b_proj.weight[memory].T)
        step = F.softplus(z @ inner.a_proj.weight[memory].T + inner.decay.dt_bias)
        alpha = torch.exp(-inner.decay.A_log.exp() * step)
        state = torch.zeros(4, 8, 8, dtype=torch.float64)
        for t, token in enumerate(tokens):
            state = alpha[t, :, None, None] * state
            error = v[t] - torch.einsum("hk,hkv->hv", k[t], state)
            state = state + beta[t, :, None, None] * k[t, :, :, None] * error[:, None]
            outputs[row, token] += share[row, token, memory] * torch.einsum("hk,hkv->hv", q[t], state) / 8**0.5
    o = rms(outputs) * inner.norm.weight * F.silu(heads(x @ inner.gate_proj.weight.T))
    expected = o.flatten(2) @ inner.o_proj.weight.T
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("inner", ["gated_deltanet", "gfw", "rwkv6", "rwkv7", "mamba2"])
def test_mom_keeps_the_inner_mixers_start(inner):
    mixer = build("mom", inner=inner, single_kv_proj=True)
    alone = MIXERS[inner](32, num_heads=4, init_std=0.3).double()
    with named_draws(torch.nn.ModuleDict({"inner": alone}), seed=1):
        alone.init_weights()
    torch.testing.assert_close(dict(mixer.inner.named_parameters()), dict(alone.named_parameters()), rtol=0, atol=0)


def test_mom_of_one_memory_a_token_trains_its_router():
    """Were one weight made to sum to one, the router would have no gradient."""
    mixer, x = build("mom", inner="gla", top_k=1, aux_loss_weight=0.0), inputs()
    mixer(x, sequence=SequenceLayout.of_rows(2, 70)).square().sum().backward()
    assert mixer.router.weight.grad.abs().max() > 1e-6


def test_mom_balance_loss():
    """Its gradient is injected in the backward, in proportion to the microbatch, and the choices are counted there."""
    mixer, x = build("mom", aux_loss_weight=0.3), inputs()
    probability = (x @ mixer.router.weight.T).softmax(-1)
    chosen = F.one_hot(probability.topk(2).indices, 4).sum(-2).double()
    aux_loss = 0.3 * 4 * (chosen.mean(1) / 2 * probability.mean(1)).sum(-1).mean()
    (expected,) = torch.autograd.grad(0.25 * aux_loss, mixer.router.weight)
    gradients = []
    for weight in (0.25, 0.0):
        y = mixer(x, sequence=SequenceLayout.of_rows(2, 70, loss_weight=weight))
        mixer.zero_grad()
        y.square().sum().backward()  # gradients of everything, since counts are gradients too
        gradients.append(mixer.router.weight.grad)
    torch.testing.assert_close(gradients[0] - gradients[1], expected, rtol=1e-9, atol=1e-9)
    counters = mixer.pop_counters()
    assert torch.equal(counters["counts"], chosen.sum((0, 1)).long())
    torch.testing.assert_close(counters["aux_loss"], 0.25 * aux_loss.detach())
    with torch.no_grad():
        mixer(x, sequence=SequenceLayout.of_rows(2, 70))
    assert not mixer.pop_counters()["counts"].any()
