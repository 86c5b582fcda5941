"""Speed and memory of the linear recurrence: python -m benchmarks.recurrence [--output FILE]

Forward and backward of the operation alone, an instance for every kind of term, beside causal softmax attention and
transformers' torch code of the chunked gated delta rule and of Mamba2 at an equal problem, all in one process in
turn. "kept" is what the operation holds from its forward to its backward beside its arguments, a token of all heads.
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
    "channel decay, erase elsewhere": ("channel", "elsewhere"),
}


def make_inputs(length: int, device: str) -> dict[str, Tensor]:
    """Every term's tensor: queries, keys and values, gates as they are after initialisation, and the cotangent."""
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


def transformers_mamba2(x: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: mamba2_chunk_scan(x["v"], x["dt"], x["head"], x["k"], x["q"], chunk_size=64)


def forward_backward(run: Callable[[], Tensor], like: Tensor) -> Callable[[], None]:
    grad = torch.randn_like(like)
    return lambda: run().backward(grad)


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps and that are no leaf's."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(kept.values())


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each case")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row")
    options = parser.parse_args()
    keep_freed_pages()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, object]] = []
    for length in options.lengths:
        x = make_inputs(length, device)
        forwards = {name: instance(terms, x) for name, terms in INSTANCES.items()}
        forwards["transformers gated delta rule"] = transformers_gated_delta(x)
        forwards["transformers Mamba2"] = transformers_mamba2(x)
        forwards["causal softmax attention"] = softmax_attention(x)
        cases = {name: forward_backward(run, x["v"]) for name, run in forwards.items()}
        seconds = interleaved_seconds(cases, repeats=options.repeats, warmups=1)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            rows.append(
                {
                    "T": length,
                    "instance": name,
                    "ms": median * 1e3,
                    "softmax / it": medians["causal softmax attention"] / median,
                    "gated delta / it": medians["transformers gated delta rule"] / median,
                    "Mamba2 / it": medians["transformers Mamba2"] / median,
                    "kept bytes a token": kept_bytes(forwards[name]) // (BATCH * length),
                }
            )
    title = f"Recurrence, forward + backward: B {BATCH}, H {HEADS}, K = V = {WIDTH}, float32"
    show(title, rows, options.output)


if __name__ == "__main__":
    main()
