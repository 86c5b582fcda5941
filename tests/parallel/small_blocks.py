"""One small block, and one step of it, for tests of what the trainer does to blocks."""

import torch

from torchlmoe.config.load import load_config
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.model.decoder import build_on_meta

DIM = 32
SETTINGS = f"""--model.dim {DIM} --model.num_heads 2 --model.num_layers 1 --model.layer_pattern L --moe.num_experts 4
--moe.top_k 2 --moe.expert_dim 16 --model.init_std 0.2""".split()
# Bounds of two rows of documents each, in order of their lengths: 64, 64, 128 and 192 tokens a row.
PACKED = [
    torch.tensor(bounds, dtype=torch.int32)
    for bounds in (
        [[0, 8, 9, 64], [0, 64, 64, 64]],
        [[0, 30, 62, 64], [0, 1, 2, 64]],
        [[0, 70, 71, 128], [0, 128, 128, 128]],
        [[0, 192, 192, 192], [0, 5, 191, 192]],
    )
]


def block_of(mixer, mlp="moe", dtype=torch.float64, **moe):
    arguments = [f"--moe.{name}={value}" for name, value in moe.items()]
    config = load_config([*SETTINGS, "--model.mixer", mixer, "--model.layers.L.mlp", mlp, *arguments])
    model = build_on_meta(config, vocab_size=50).to(dtype).to_empty(device="cpu")
    model.init_weights(seed=0)
    return model.blocks["0"]


def run(block, bounds, dtype, before_backward=lambda: None, lengths_vary=False):
    """Output, gradients of input and parameters, and what the experts counted.

    lengths_vary: torch.compile is told so, and fails where a graph is for one length only.
    """
    length = int(bounds[0, -1])
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(1, 2 * length, DIM, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    for parameter in block.parameters():
        parameter.grad = None
    sequence = SequenceLayout.of_packed_rows(bounds, length, loss_weight=0.5)
    if lengths_vary:
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(sequence.positions, 1)
    y = block(x, sequence=sequence)
    loss = y.square().mean()
    before_backward()
    loss.backward()
    results = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}
    return results | (block.feed_forward.pop_counters() if isinstance(block.feed_forward, MoE) else {})
