"""What holds for every mixer: documents do not meet, decoding continues a prefill, settings are typed, FLOPs counted.

A new mixer is one row in CASES.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchlmoe.config.load import load_config
from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.base import Place
from torchlmoe.mixers.mom import OWN_PROJECTIONS
from torchlmoe.routing.router import Router

SCALED = dict(factor=4.0, original_max_position_embeddings=64)
# id -> (mixer, its settings beyond dim = 32 and, where it has heads, num_heads = 4)
CASES = {
    "bla": ("bla", {}),
    "bla_normalizer": ("bla", dict(feature_map="elu", normalizer=True)),
    "lightning": ("lightning", {}),
    "retention": ("retention", {}),
    "gla": ("gla", {}),
    "hgrn2": ("hgrn2", dict(expand_k=0.5)),
    "mamba2": ("mamba2", dict(state_dim=8)),
    "mamba2_groups": ("mamba2", dict(state_dim=6, num_groups=2, expand_v=1.0, min_step=0.01, max_step=0.5)),
    "mamba2_biases": ("mamba2", dict(state_dim=6, num_groups=2, head_dim=5, conv_bias=False, proj_bias=True)),
    "rwkv6": ("rwkv6", dict(mix_rank=4, decay_rank=6)),
    "rwkv7": ("rwkv7", dict(decay_rank=4, gate_rank=6)),
    "gateloop": ("gateloop", {}),
    "gfw": ("gfw", {}),
    "gfw_sizes": ("gfw", dict(expand_k=0.5, expand_v=1.5)),
    "gfw_full": ("gfw", dict(gate="full", gate_rank=4, expand_v=0.5)),
    "based": ("based", dict(feature_dim=4)),
    "rebased": ("rebased", dict(feature_dim=4)),
    "deltanet": ("deltanet", {}),
    "deltanet_negative_eigenvalues": ("deltanet", dict(expand_v=2.0, negative_eigenvalues=True)),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet_shared_keys": ("gated_deltanet", dict(num_key_heads=2, head_dim=6, expand_v=2.0, conv_size=2)),
    "kda": ("kda", {}),
    "kda_shared_keys": ("kda", dict(num_key_heads=2, head_dim=6, expand_v=2.0, gate_rank=4)),
    "kda_bounded": ("kda", dict(full_rank_decay=True, full_rank_gate=True, decay_lower_bound=-5.0)),
    "gsa": ("gsa", {}),
    "gsa_sizes": ("gsa", dict(expand_k=0.5, expand_v=1.5, num_slots=6, gate_normalizer=2.0)),
    "mom": ("mom", {}),
    "mom_sizes": ("mom", dict(num_memories=3, top_k=1, shared_memory=False, inner="gla")),
    "mom_single_kv_proj": ("mom", dict(single_kv_proj=True)),
    "s4": ("s4", {}),
    "s4_linear": ("s4", dict(state_dim=6, initialization="linear")),
    "mamba": ("mamba", {}),
    "mamba_sizes": ("mamba", dict(expand=1.5, state_dim=3, step_rank=5, conv_size=2)),
    "mamba_biases": ("mamba", dict(state_dim=3, conv_bias=False, proj_bias=True)),
    "ttt": ("ttt", dict(mini_batch_size=4)),
    "titans": ("titans", dict(mini_batch_size=4)),
    "attention": ("attention", {}),
    "attention_all_options": (
        "attention",
        dict(num_kv_heads=2, head_dim=12, rotary_fraction=0.5, qk_norm=True, output_gate=True, sliding_window=4),
    ),
    "attention_latent": ("attention", dict(kv_rank=12, q_rank=10, rotary_fraction=0.5, output_gate=True)),
    "attention_latent_no_rotary": (
        "attention",
        dict(kv_rank=12, head_dim=10, rotary_fraction=0.0, shared_key_dim=4, sliding_window=4),
    ),
    "attention_no_rotary": ("attention", dict(rotary_fraction=0.0)),
    "attention_biases": (
        "attention",
        dict(
            num_kv_heads=2,
            qkv_bias=True,
            output_bias=True,
            output_gate="per_head",
            softmax_scale=0.7,
            sliding_window=6,
            rope_scaling=dict(type="yarn", **SCALED, mscale=0.7, mscale_all_dim=2.0),
        ),
    ),
    "attention_latent_biases": (
        "attention",
        dict(
            kv_rank=12,
            q_rank=10,
            rotary_fraction=0.5,
            qkv_bias=True,
            output_bias=True,
            output_gate="per_head",
            softmax_scale=0.7,
            rope_scaling=dict(type="yarn", **SCALED, mscale_all_dim=2.0),
        ),
    ),
    "attention_norm_of_all_heads": (
        "attention",
        dict(
            num_kv_heads=2,
            head_dim=6,
            qk_norm="all_heads",
            zero_centered_norm=True,
            rope_scaling=dict(type="llama3", **SCALED),
        ),
    ),
    "retention_scaled": ("retention", dict(head_dim=6, rope_scaling=dict(type="linear", factor=4.0))),
}
# A mixture of memories over each mixer that can have one, for what memories could break.
MIXTURES = {
    f"mom_{name}{'_single' * single}": ("mom", dict(inner=name, inner_options=CASES[name][1], single_kv_proj=single))
    for name in MIXERS
    for single in (False, True)
    if name not in ("mom", "attention", "gsa", "gateloop", "s4", "mamba", "ttt", "titans")
    and (single or name in OWN_PROJECTIONS)
}
HEADLESS = ("s4", "mamba")
DIM, HEADS = 32, 4
# Two rows of 20: three documents of which one has one token, and a row that is one document.
BOUNDS = torch.tensor([[0, 8, 9, 20, 20], [0, 20, 20, 20, 20]], dtype=torch.int32)
PACKED = SequenceLayout.of_packed_rows(BOUNDS, 20, loss_weight=0.0)


def build(case, dtype=torch.float64, **more):
    name, options = (CASES | MIXTURES)[case]
    heads = {} if name in HEADLESS else {"num_heads": HEADS}
    mixer = MIXERS[name](DIM, init_std=0.3, **heads, **options, **more).to(dtype)
    with named_draws(mixer, seed=0):
        mixer.init_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if not parameter.any():  # a zero would hide what it multiplies
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer


def inputs(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_every_mixer_is_covered():
    assert {name for name, _ in CASES.values()} == set(MIXERS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_does_not_change_initial_weights(case, dtype):
    expected, before = initial_weights(case), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = initial_weights(case)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def initial_weights(case):
    """Of the second of three layers, where what depends on the depth is neither zero nor one."""
    name, options = CASES[case]
    heads = {} if name in HEADLESS else {"num_heads": HEADS}
    mixer = MIXERS[name].at(Place(1, 3, first=False), DIM, **heads, **options).float()
    with named_draws(mixer, seed=0):
        mixer.init_weights()
    return dict(mixer.named_parameters())


@pytest.mark.parametrize("case", CASES | MIXTURES)
def test_documents_do_not_meet(case):
    """Gradients across documents are exactly zero, and a packed document's output is its output alone."""
    mixer, x = build(case), inputs(1, 40).requires_grad_()
    y = mixer(x, sequence=PACKED)
    for start, end in [(0, 8), (8, 9), (9, 20), (20, 40)]:
        (gradient,) = torch.autograd.grad(y[:, start:end].square().sum(), x, retain_graph=True)
        assert gradient[:, start:end].abs().max() > 0
        assert not gradient[:, :start].any()
        assert not gradient[:, end:].any()
        alone = mixer(x[:, start:end], sequence=SequenceLayout.of_rows(1, end - start))
        torch.testing.assert_close(y[:, start:end], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_no_token_sees_a_later_one(case):
    mixer, x = build(case), inputs(1, 20).requires_grad_()
    y = mixer(x, sequence=SequenceLayout.of_rows(1, 20, loss_weight=0.0))
    (gradient,) = torch.autograd.grad(y[:, :11].square().sum(), x)
    assert not gradient[:, 11:].any()


@pytest.mark.parametrize("case", CASES)
def test_autocast(case):
    """Projections in bfloat16, all else as it is."""
    mixer, x = build(case, torch.float32), inputs(1, 40).float().requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = mixer(x, sequence=PACKED)
        loss = (y * torch.linspace(-1, 1, DIM)).sum()
        results.append((y, *torch.autograd.grad(loss, (x, *mixer.parameters()))))
    (y, *grads), (y_autocast, *grads_autocast) = results
    assert (y_autocast - y).norm() < 0.03 * y.norm()
    for expected, grad in zip(grads, grads_autocast, strict=True):
        assert (grad - expected).norm() <= 0.3 * expected.norm() + 1e-5


@pytest.mark.parametrize("case", CASES | MIXTURES)
def test_decoding_continues_a_prefill(case):
    mixer, x = build(case), inputs(3, 12)
    expected = mixer(x, sequence=SequenceLayout.of_rows(3, 12))
    cache = mixer.init_cache(3, 12, torch.float64)
    mixer(
        x.flip(0, 1), sequence=SequenceLayout.of_rows(3, 12), cache=cache
    )  # a cache may serve one document after another
    pieces = []
    for start, end in [(0, 7), (7, 8), (8, 9), (9, 12)]:
        sequence = SequenceLayout(torch.arange(start, end).expand(3, -1))
        pieces.append(mixer(x[:, start:end], sequence=sequence, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_several_chunks(case):
    """Beyond a chunk of 64, with empty documents and with tokens that are zero or large: documents alone, decoding,
    the other backend, and a gradient for every parameter.
    """
    x = inputs(1, 200)
    x[:, [1, 20, 64, 65, 130, 199]] = 0.0
    x[:, [0, 30, 66, 128, 150]] *= 20.0
    bounds = [0, 0, 1, 2, 66, 131, 131, 200]
    packed = SequenceLayout.of_packed_rows(torch.tensor([bounds], dtype=torch.int32), 200, loss_weight=0.0)
    backends = ["chunked", "reference"] if "backend" in MIXERS[CASES[case][0]].settings() else [None]
    results = []
    for backend in backends:
        mixer = build(case, **({} if backend is None else {"backend": backend}))
        y = mixer(x, sequence=packed)
        (y * inputs(1, 200).flip(1)).sum().backward()
        results.append({"output": y.detach()} | {name: p.grad for name, p in mixer.named_parameters()})
        for name, gradient in results[-1].items():
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            assert gradient.any(), name
    for name, expected in results[-1].items():
        assert_near(results[0][name], expected, name)

    mixer = build(case)
    with torch.no_grad():
        for start, end in zip(bounds, bounds[1:], strict=False):
            if start < end:
                alone = mixer(x[:, start:end], sequence=SequenceLayout.of_rows(1, end - start))
                assert_near(results[0]["output"][:, start:end], alone, f"document {start} to {end}")
        whole = mixer(x, sequence=SequenceLayout.of_rows(1, 200))
        cache, pieces, splits = mixer.init_cache(1, 200, torch.float64), [], [0, 65, 66, 129, 130, 200]
        for start, end in zip(splits, splits[1:], strict=False):
            sequence = SequenceLayout(torch.arange(start, end)[None])
            pieces.append(mixer(x[:, start:end], sequence=sequence, cache=cache))
        assert_near(torch.cat(pieces, 1), whole, "decoding")


def assert_near(found, expected, what):
    assert (found - expected).norm() <= 1e-9 * expected.norm(), what


@pytest.mark.parametrize("case", CASES)
def test_low_precision_stays_near(case):
    mixer, x = build(case), inputs(1, 40)
    sequence = PACKED
    expected = mixer(x, sequence=sequence)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        y = build(case, dtype)(x.to(dtype), sequence=sequence)
        assert y.dtype is dtype
        assert (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("case", CASES)
def test_flops_of_projections(case):
    """The counted FLOPs, less what the recurrence or softmax attention is said to take, are those torch counts."""
    mixer = build(case, torch.float32)
    x = inputs(1, 64).float()
    # The plain form of softmax attention is the one that torch counts on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x, sequence=SequenceLayout.of_rows(1, 64))
    linear = sum(2 * m.weight.numel() for m in mixer.modules() if isinstance(m, (torch.nn.Linear, Router)))
    counted = counter.get_flop_counts()["Global"]
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)  # without and with a bias
    assert sum(counted.get(product, 0) for product in products) == 64 * linear
    across_tokens = sum(flops for operation, flops in counted.items() if operation not in products)
    said = 64 * (mixer.flops_per_token(64) - linear)
    if "attention" in case:  # torch counts the whole square, twice what a causal token sees
        window = CASES[case][1].get("sliding_window")
        across_tokens = across_tokens // 2 if window is None else across_tokens * window // 64
    convolutions = sum(2 * m.weight.numel() for n, m in mixer.named_modules() if n.endswith("_conv"))
    if case == "mom":  # which see a token in each of its memories
        convolutions *= 3
    assert said == pytest.approx(across_tokens + 64 * convolutions, rel=1e-6)


@pytest.mark.parametrize("case", MIXERS)
@pytest.mark.parametrize("sequence", [PACKED, SequenceLayout.of_rows(1, 300)], ids=["packed", "one_row"])
def test_gradients_under_a_dispatch_mode(case, sequence):
    """Such as FlopCounterMode. Operations that it calls have neither torch.func nor lazy conjugation."""
    mixer, length = build(case), sequence.positions.shape[1]
    shared = {"shared": torch.zeros(1, length, DIM, dtype=torch.float64)} if mixer.shared_width else {}

    def gradients():
        x = inputs(1, length).requires_grad_()
        mixer.zero_grad()
        y = mixer(x, sequence=sequence, **shared)
        (y[0] if shared else y).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in mixer.parameters())]

    expected = gradients()
    with FlopCounterMode(display=False):
        found = gradients()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_settings_reach_the_constructor(case):
    name, options = CASES[case]
    flat = {}
    for key, value in options.items():
        flat |= {f"{key}.{name}": of_it for name, of_it in value.items()} if isinstance(value, dict) else {key: value}
    config = load_config(
        ["--model.mixer", name, *(f"--model.layers.L.{key}={str(value).lower()}" for key, value in flat.items())]
    )
    given = {key: value for key, value in options.items() if value != {}}
    assert config.model.layers["L"] == {"mixer": name, "mlp": "moe", **given}


def test_widths_are_rounded_to_the_nearest():
    for name, kind in MIXERS.items():
        if "expand_v" in kind.settings():
            head = {"head_dim": 100} if "head_dim" in kind.settings() else {}
            mixer = MIXERS[name](100, num_heads=1, expand_v=0.57, **head)
            assert mixer.v_proj.out_features == 57, name


def test_backend_reaches_every_recurrence():
    for name, kind in MIXERS.items():
        if "backend" in kind.settings():
            mixer = MIXERS[name](32, **({} if name in HEADLESS else {"num_heads": 4}), backend="reference")
            assert {m.backend for m in mixer.modules() if hasattr(m, "backend")} == {"reference"}, name


def test_impossible_sizes_are_refused():
    for name, kind in MIXERS.items():
        for width in {"expand", "expand_k", "expand_v"} & kind.settings().keys():
            heads = {"num_heads": 4} if "num_heads" in kind.settings() else {}
            with pytest.raises(ValueError, match=r"= 0 cannot be split into num_heads = 4 heads|gives no channels"):
                MIXERS[name](32, **heads, **{width: 1e-9})
    with pytest.raises(ValueError, match=r"dim = 32 cannot be split into num_heads = 5 heads"):
        MIXERS["bla"](32, num_heads=5)
    with pytest.raises(ValueError, match=r"num_heads = 4 must be a multiple of num_kv_heads = 3"):
        MIXERS["attention"](32, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"num_heads = 4 must be a multiple of num_key_heads = 3"):
        MIXERS["gated_deltanet"](32, num_heads=4, num_key_heads=3)
    with pytest.raises(ValueError, match=r"rotary_fraction = 0.4 of head_dim = 8 gives 3; make it an even number"):
        MIXERS["attention"](32, num_heads=4, rotary_fraction=0.4)
    with pytest.raises(ValueError, match="num_kv_heads cannot be combined with kv_rank = 8"):
        MIXERS["attention"](32, num_heads=4, kv_rank=8, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"shared_key_dim = 8 must be at least the 8 rotary .* below head_dim = 8"):
        MIXERS["attention"](32, num_heads=4, kv_rank=8)
    with pytest.raises(ValueError, match="value_dim = 9 must not be above head_dim = 8"):
        MIXERS["attention"](32, num_heads=4, kv_rank=8, rotary_fraction=0.5, value_dim=9)
    with pytest.raises(ValueError, match="qk_norm cannot be combined with kv_rank = 8"):
        MIXERS["attention"](32, num_heads=4, kv_rank=8, rotary_fraction=0.5, qk_norm="all_heads")
    with pytest.raises(ValueError, match="rope_scaling has type = 'nope'; choose one of default, linear"):
        MIXERS["attention"](32, num_heads=4, rope_scaling={"type": "nope"})
    with pytest.raises(ValueError, match="gate_rank = 4 has no effect with full_rank_decay and full_rank_gate"):
        MIXERS["kda"](32, num_heads=4, gate_rank=4, full_rank_decay=True, full_rank_gate=True)
    with pytest.raises(ValueError, match="value_dim needs latent attention"):
        MIXERS["attention"](32, num_heads=4, value_dim=4)
    for name in ("gateloop", "retention"):
        with pytest.raises(ValueError, match="in num_heads = 4 heads gives 5; make it an even number"):
            MIXERS[name](20, num_heads=4)
    with pytest.raises(ValueError, match=r"max_step = 0.1 must not be below min_step = 0.2"):
        MIXERS["mamba2"](32, num_heads=4, min_step=0.2, max_step=0.1)
    with pytest.raises(ValueError, match="normalizer = true divides by a sum"):
        MIXERS["bla"](32, num_heads=4, normalizer=True)
    with pytest.raises(ValueError, match="feature_dim = 1 must be at least 2"):
        MIXERS["rebased"](32, num_heads=4, feature_dim=1)
    with pytest.raises(ValueError, match="gate_rank = 4 needs gate = 'full'"):
        MIXERS["gfw"](32, num_heads=4, gate_rank=4)
    with pytest.raises(ValueError, match="inner = 'nope' is not a mixer; choose from attention"):
        MIXERS["mom"](32, num_heads=4, inner="nope")
    with pytest.raises(ValueError, match="top_k = 5 is more than num_memories = 4"):
        MIXERS["mom"](32, num_heads=4, top_k=5)
    for inner in ("mamba2", "rwkv6", "rwkv7"):
        with pytest.raises(ValueError, match=f"inner = '{inner}' cannot have separate keys and values for each memory"):
            MIXERS["mom"](32, num_heads=4, inner=inner)
    for inner in ("attention", "gsa", "gateloop", "mom"):
        with pytest.raises(ValueError, match=f"inner = '{inner}' cannot have a mixture of memories"):
            MIXERS["mom"](32, num_heads=4, inner=inner)
