"""Speed and memory of the linear recurrence: python -m benchmarks.recurrence [--output FILE]

Forward and backward of the operation with every kind of term, beside causal softmax attention and transformers' torch
code of the chunked gated delta rule and of Mamba2 at equal sizes. All run in one process in turn: first with the
default of the C library, which returns freed memory, then with freed memory kept in the process, as in torchlmoe's
trainer. The columns softmax to Mamba2 have the time of those divided by that of the row. "saved" is the number of bytes
per token, over all heads, that autograd keeps for the backward besides the arguments.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.report import arguments, interleaved_seconds, show
from torchlmoe.ops import linear_recurrence
from torchlmoe.training.host_memory import keep_freed_pages

BATCH, HEADS, WIDTH = 2, 4, 64  # keys and values are equally wide
LENGTHS = (2048, 4096, 8192)
SOFTMAX, GATED_DELTA = "causal softmax attention", "transformers gated delta"
MAMBA2 = {size: f"transformers Mamba2, C {size}" for size in (64, 256)}  # chunks as long as ours; its default
INSTANCES = {
    "no decay": (),
    "decay per head": ("head",),
    "scalar decay": ("scalar",),
    "channel decay": ("channel",),
    "channel decay, bonus": ("channel", "bonus"),
    "value decay": ("value",),
    "delta rule": ("beta",),
    "gated delta rule": ("scalar", "beta"),
    "channel decay, delta rule": ("channel", "beta"),
    "channel decay, own erase key": ("channel", "elsewhere"),
}


def make_inputs(length: int, device: str) -> dict[str, Tensor]:
    """Return queries, keys, values, and the tensor of every term, with gates like those after initialization."""
    tokens = (BATCH, length, HEADS)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    inputs = {
        "q": randn(*tokens, WIDTH),
        "k": F.normalize(randn(*tokens, WIDTH), dim=-1),
        "v": randn(*tokens, WIDTH),
        "head": -torch.rand(HEADS, device=device),
        "scalar": F.logsigmoid(randn(*tokens)),
        "channel": F.logsigmoid(randn(*tokens, WIDTH)).clamp_min(-0.6),
        "value": F.logsigmoid(randn(*tokens, WIDTH)),
        "beta": torch.rand(*tokens, device=device),
        "elsewhere": F.normalize(randn(*tokens, WIDTH), dim=-1),
        "bonus": randn(HEADS, WIDTH),
        "dt": torch.rand(*tokens, device=device),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def instance(terms: tuple[str, ...], x: dict[str, Tensor]) -> Callable[[], Tensor]:
    arguments_of = {
        "head": lambda: {"log_decay": x["head"]},
        "scalar": lambda: {"log_decay": x["scalar"]},
        "channel": lambda: {"log_decay": x["channel"]},
        "value": lambda: {"value_log_decay": x["value"]},
        "bonus": lambda: {"bonus": x["bonus"]},
        "beta": lambda: {"erase": x["beta"]},
        "elsewhere": lambda: {"erase": x["beta"], "erase_key": x["elsewhere"]},
    }
    given = {name: tensor for term in terms for name, tensor in arguments_of[term]().items()}
    return lambda: linear_recurrence(x["q"], x["k"], x["v"], scale=WIDTH**-0.5, **given)[0]


def softmax_attention(x: dict[str, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def transformers_gated_delta(x: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: torch_chunk_gated_delta_rule(x["q"], x["k"], x["v"], g=x["scalar"], beta=x["beta"])[0]


def transformers_mamba2(x: dict[str, Tensor], chunk_size: int) -> Callable[[], Tensor]:
    return lambda: mamba2_chunk_scan(x["v"], x["dt"], x["head"], x["k"], x["q"], chunk_size=chunk_size)


def forward_backward(run: Callable[[], Tensor], like: Tensor) -> Callable[[], None]:
    grad = torch.randn_like(like)
    return lambda: run().backward(grad)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Return the bytes of tensors that autograd saves, without leaves."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(saved.values())


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each case")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, object]] = []
    for freed_pages in ("returned", "kept"):
        if freed_pages == "kept" and not keep_freed_pages():
            break
        for length in options.lengths:
            x = make_inputs(length, device)
            forwards = {name: instance(terms, x) for name, terms in INSTANCES.items()}
            forwards[SOFTMAX] = softmax_attention(x)
            forwards[GATED_DELTA] = transformers_gated_delta(x)
            forwards |= {name: transformers_mamba2(x, size) for size, name in MAMBA2.items()}
            cases = {name: forward_backward(run, x["v"]) for name, run in forwards.items()}
            seconds = interleaved_seconds(cases, repeats=options.repeats, warmups=1)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            for name, median in medians.items():
                rows.append(
                    {
                        "pages": freed_pages,
                        "T": length,
                        "instance": name,
                        "ms": median * 1e3,
                        "softmax": medians[SOFTMAX] / median,
                        "delta": medians[GATED_DELTA] / median,
                        **{f"Mamba2 {size}": medians[name] / median for size, name in MAMBA2.items()},
                        "saved": saved_bytes(forwards[name]) // (BATCH * length),
                    }
                )
    title = f"Recurrence, forward + backward: B {BATCH}, H {HEADS}, K = V = {WIDTH}, float32"
    show(title, rows, options.output)


if __name__ == "__main__":
    main()
