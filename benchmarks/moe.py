"""Speed of one mixture-of-experts layer: python -m benchmarks.moe [--output FILE]

Forward and backward of router, token dispatch, experts and combine, beside dense matrix products with the FLOPs of the
experts (the cost of a layer without routing), and beside the router and experts of transformers' Qwen2-MoE, with its
loop over experts and with grouped_mm.

TFLOP/s count the products of the experts only: three times those of the forward.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from benchmarks.report import arguments, interleaved_seconds, show
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.ops.host_dtype import cpu_lacks_bfloat16
from torchlmoe.training.host_memory import keep_freed_pages

TOKENS, DIM, EXPERT_DIM, EXPERTS, TOP_K = 4096, 256, 128, 64, 8


def dense_products(dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Return the matrix products of the experts' forward and backward, as if all rows had the same expert."""
    rows = TOKENS * TOP_K

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, gate_up_proj, down_proj = randn(rows, DIM), randn(2 * EXPERT_DIM, DIM), randn(DIM, EXPERT_DIM)
    gate_up, hidden, y = randn(rows, 2 * EXPERT_DIM), randn(rows, EXPERT_DIM), randn(rows, DIM)

    def run() -> None:
        for left, right in (
            (x, gate_up_proj.T),
            (hidden, down_proj.T),
            (y, down_proj),
            (y.T, hidden),
            (gate_up, gate_up_proj),
            (gate_up.T, x),
        ):
            torch.mm(left, right)

    return run


def our_layer(dtype: torch.dtype, device: str) -> Callable[[], None]:
    layer = MoE(DIM, num_experts=EXPERTS, top_k=TOP_K, expert_dim=EXPERT_DIM).to(device)
    layer.init_weights()
    layer.experts.to(dtype)
    sequence = SequenceLayout.of_rows(1, TOKENS, torch.device(device))
    return forward_backward(lambda x: layer(x[None], sequence=sequence)[0], dtype, device)


def transformers_layer(dtype: torch.dtype, device: str, experts: str) -> Callable[[], None]:
    config = Qwen2MoeConfig(
        hidden_size=DIM,
        moe_intermediate_size=EXPERT_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        experts_implementation=experts,
    )
    block = Qwen2MoeSparseMoeBlock(config).to(device, dtype).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def routed(x: Tensor) -> Tensor:
        _, weight, expert = block.gate(x)
        return block.experts(x, expert, weight)

    return forward_backward(routed, dtype, device)


def forward_backward(layer: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Return a run of `layer` over fixed tokens. Gradients accumulate over runs, as over microbatches."""
    x, grad = (torch.randn(TOKENS, DIM, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()
    return lambda: layer(x).backward(grad)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each case")
    options = parser.parse_args()
    keep_freed_pages()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.float32]
    if device == "cuda" or not cpu_lacks_bfloat16():
        dtypes.append(torch.bfloat16)
    flops = 3 * 6 * TOKENS * TOP_K * DIM * EXPERT_DIM
    rows = []
    for dtype in dtypes:
        cases = {
            "dense products alone": dense_products(dtype, device),
            "torchlmoe": our_layer(dtype, device),
            "transformers, loop over experts": transformers_layer(dtype, device, "eager"),
            "transformers, grouped_mm": transformers_layer(dtype, device, "grouped_mm"),
        }
        seconds = interleaved_seconds(cases, repeats=options.repeats)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            rows.append(
                {
                    "layer": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "median ms": median * 1e3,
                    "least ms": min(seconds[name]) * 1e3,
                    "TFLOP/s": flops / median / 1e12,
                    "of dense rate": medians["dense products alone"] / median,
                    "torchlmoe is faster by": median / medians["torchlmoe"],
                }
            )
    sizes = {"tokens": TOKENS, "dim": DIM, "expert_dim": EXPERT_DIM, "experts": EXPERTS, "top_k": TOP_K}
    title = ", ".join(f"{name} {size}" for name, size in sizes.items())
    show(f"MoE layer, forward + backward: {title}", rows, options.output, shapes=sizes)


if __name__ == "__main__":
    main()
