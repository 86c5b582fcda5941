"""TTT and Titans token by token after their papers, with the inner gradient taken by autograd, in float64."""

import torch
import torch.nn.functional as F

from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS

LENGTH, HEADS, BATCH = 21, 4, 4  # BATCH: tokens of a mini-batch


def drawn(name):
    mixer = MIXERS[name](32, num_heads=HEADS, mini_batch_size=BATCH, init_std=0.3).double()
    with named_draws(mixer, seed=1):
        mixer.init_weights()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # biases and norms too: at their starting values some would not show
        for name, parameter in mixer.named_parameters():
            if parameter.dim() == 1 and "decay" not in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mixer


def inputs():
    return torch.randn(1, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def convolved(x, convolution, bias=None):
    return F.conv1d(F.pad(x.mT, (3, 0)), convolution.weight[:, None], bias, groups=32).mT


def heads(x):
    return x.view(LENGTH, HEADS, -1)


def learn(fast, q, k, v, learning_rate, momentum=None, keep=None, bias=None, scale=None):
    """q, k, v [T, H, K]; scale [BATCH], of the step so far; the others [T, H] -> [T, H, V]; a head after the other, a
    token after the other.
    """
    outputs = torch.zeros_like(v)
    for head in range(HEADS):
        weight, shift = (x.view(HEADS, -1)[head] for x in (fast.norm_weight, fast.norm_bias))
        theta = [fast.weight[head]] + ([] if bias is None else [bias.view(HEADS, -1)[head]])
        read, surprise = theta, [torch.zeros_like(x) for x in theta]

        def model(x, theta, weight=weight, shift=shift):
            return x + F.layer_norm(x @ theta[0] + sum(theta[1:]), (x.shape[-1],), weight, shift, 1e-6)

        for t in range(LENGTH):
            if t % BATCH == 0:
                theta = list(read)
                start = [x.detach().requires_grad_() for x in theta]
            loss = (model(k[t, head], start) - v[t, head]).square().sum() / 2
            for index, gradient in enumerate(torch.autograd.grad(loss, start)):
                kept = 0.0 if momentum is None else momentum[t, head]
                surprise[index] = kept * surprise[index] - learning_rate[t, head] * gradient
                theta[index] = (1.0 if keep is None else keep[t, head]) * theta[index] + surprise[index]
            share = 1.0 if scale is None else scale[t % BATCH]
            read = [first.detach() + share * (now - first.detach()) for first, now in zip(start, theta, strict=True)]
            outputs[t, head] = model(q[t, head], read)
    return outputs.detach()


def test_ttt():
    """arXiv 2407.04620, sections 2.4 to 2.7, and the authors' layer for the Mamba backbone (`ttt.py` of their code)."""
    mixer, x = drawn("ttt"), inputs()
    shared = mixer.q_proj(x)
    q, k = (convolved(shared, c, c.bias) for c in (mixer.q_conv, mixer.k_conv))
    place = torch.arange(LENGTH) % BATCH
    angle = place[:, None, None] * 10_000 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = [torch.complex(heads(y)[..., :4], heads(y)[..., 4:]) * turn for y in (q, k)]
    q, k = (torch.cat([y.real, y.imag], -1) for y in turned)
    rate = torch.sigmoid(mixer.learning_rate_proj(x) + mixer.step_size.bias)[0] / 8
    with torch.no_grad():
        mixer.step_size.offset[1] = -0.7  # more than the share of the second place, which stays at zero
    scale = (1 / torch.arange(1, BATCH + 1).double() + mixer.step_size.offset).clamp_min(0)
    o = learn(mixer.fast_weights, q, k, heads(mixer.v_proj(x)), rate, bias=mixer.fast_weights.bias, scale=scale)
    o = F.layer_norm(o.flatten(1), (32,), mixer.norm.weight, mixer.norm.bias, 1e-6)
    expected = mixer.o_proj(o * F.gelu(mixer.gate_proj(x), approximate="tanh"))
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(1, LENGTH)), expected, rtol=1e-9, atol=1e-11)


def test_titans():
    """arXiv 2501.00663, equations 11 to 14, mini-batches of section 3.2, and the layer of section 4.4."""
    mixer, x = drawn("titans"), inputs()
    q, k, v = (heads(F.silu(convolved(getattr(mixer, f"{n}_proj")(x), getattr(mixer, f"{n}_conv")))) for n in "qkv")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    rate = torch.sigmoid(mixer.learning_rate_proj(x))[0]
    eta = torch.sigmoid(mixer.momentum_proj(x) + mixer.momentum.bias)[0]
    alpha = 1 - torch.sigmoid(mixer.forget_proj(x) + mixer.decay.bias)[0]
    o = learn(mixer.fast_weights, q, k, v, rate, momentum=eta, keep=1 - alpha)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    expected = mixer.o_proj((o * F.silu(heads(mixer.gate_proj(x)))).flatten(1))[None]
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(1, LENGTH)), expected, rtol=1e-9, atol=1e-11)
