"""Heads whose width is not dim / num_heads: every mixer with heads takes `head_dim`, and all its parts follow."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.mixers.test_every_mixer import DIM, HEADLESS, HEADS, PACKED, inputs
from tests.mixers.test_roles import ONE_GROUP, PARTS, SUMS_OVER_HEADS, part_of
from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS

HEAD_DIM = 6  # 24 channels of heads in a stream of 32
MORE = {"mamba2": dict(state_dim=8), "mom": {}, "ttt": dict(mini_batch_size=4), "titans": dict(mini_batch_size=4)}
WITH_HEADS = [name for name in MIXERS if name not in HEADLESS]


def build(name, head_dim):
    """A mixture of memories hands `head_dim` on to its inner mixer."""
    sizes = {"inner_options": {"head_dim": head_dim}} if name == "mom" else {"head_dim": head_dim}
    mixer = MIXERS[name](DIM, num_heads=HEADS, init_std=0.3, **sizes, **MORE.get(name, {})).double()
    with named_draws(mixer, seed=0):
        mixer.init_weights()
    return mixer


@pytest.mark.parametrize("name", WITH_HEADS)
@torch.no_grad()
def test_head_dim(name):
    mixer, usual = build(name, HEAD_DIM), build(name, None)
    # Shapes: the same parameters, narrower along heads and nowhere else.
    shapes, usual_shapes = ({key: tuple(p.shape) for key, p in m.named_parameters()} for m in (mixer, usual))
    assert shapes.keys() == usual_shapes.keys()
    assert {key.rpartition(".")[0] for key in shapes if shapes[key] != usual_shapes[key]} >= {
        key.rpartition(".")[0] for key in shapes if key.endswith(("v_proj.weight", "o_proj.weight"))
    }
    assert all(mine <= theirs for key in shapes for mine, theirs in zip(shapes[key], usual_shapes[key], strict=True))
    # Decoding.
    x = inputs(2, 12)
    expected = mixer(x, sequence=SequenceLayout.of_rows(2, 12))
    assert expected.shape == x.shape
    cache, pieces = mixer.init_cache(2, 12, torch.float64), []
    for start, end in [(0, 7), (7, 8), (8, 12)]:
        sequence = SequenceLayout(torch.arange(start, end).expand(2, -1))
        pieces.append(mixer(x[:, start:end], sequence=sequence, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-10, atol=1e-12)
    # FLOPs of projections.
    with FlopCounterMode(display=False) as counter:
        mixer(x, sequence=SequenceLayout.of_rows(2, 12))
    linear = sum(2 * m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    if name != "mom":
        assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 24 * linear
    assert linear < mixer.flops_per_token(12) < usual.flops_per_token(12)
    # Roles: parts of the heads add up.
    if name in ONE_GROUP:
        return
    common = mixer.common(1)
    handed = {} if common is None else {"common": torch.rand(common()[0].shape, dtype=torch.float64)}
    x = inputs(1, 40)
    parts = [part_of(mixer, index)(x, sequence=PACKED, **handed) for index in range(PARTS)]
    whole = mixer(x, sequence=PACKED, **handed)
    difference = (sum(parts) - whole).norm() / whole.norm()
    assert difference > 1e-3 if name in SUMS_OVER_HEADS else difference < 1e-10


def test_what_expand_means_with_head_dim():
    for name, kind in MIXERS.items():
        if "expand_v" in kind.settings():
            sizes = dict(expand_k=2.0) if "expand_k" in kind.settings() else {}
            mixer = kind(DIM, num_heads=HEADS, head_dim=HEAD_DIM, expand_v=2.0, **sizes, **MORE.get(name, {}))
            assert mixer.v_proj.out_features == HEADS * HEAD_DIM * 2, name
            if sizes:
                assert mixer.q_proj.out_features == HEADS * HEAD_DIM * 2, name
    with pytest.raises(ValueError, match="the width of all keys = 10 cannot be split into num_heads = 4 heads"):
        MIXERS["gla"](DIM, num_heads=HEADS, head_dim=5, expand_k=0.5)
