"""Training speed of the whole model: python -m benchmarks.training [--output FILE]

The first table compares forward, backward and AdamW with transformers' Qwen3-Next of the same sizes (LLLN: three blocks
of Gated DeltaNet and one of gated attention; 16 experts, 4 of them active, and a gated shared one). Each model has a
separate process, and they run steps in turn. The second table has every mixer in a small model, from short rows to long
ones at equal tokens per step.

Speeds are tokens/s, and the rate of the model's FLOPs divided by the measured rate of matrix products in the same
dtype. torchlmoe's trainer keeps freed memory in the process; "kept pages" uses that setting for transformers too.
"""

import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.peak_bytes import PeakBytes
from benchmarks.report import Worker, arguments, interleaved_seconds, matmul_rate, show
from torchlmoe.config.load import load_config
from torchlmoe.config.settings import Config
from torchlmoe.mixers import MIXERS
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.ops.host_dtype import cpu_lacks_bfloat16
from torchlmoe.parallel.mesh import choose_device, start_process_group
from torchlmoe.parallel.parallelize import build_model
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.training.host_memory import keep_freed_pages
from torchlmoe.training.optimizer import build_optimizer, clip_gradients

DIM, LAYERS, HEADS, HEAD_DIM, VOCAB = 256, 8, 4, 64, 8192
EXPERTS, TOP_K, EXPERT_DIM, SHARED_DIM = 16, 4, 128, 128
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)

SIZES = f"""
--model.dim {DIM} --model.num_layers {LAYERS} --model.num_heads {HEADS} --model.vocab_size {VOCAB}
--moe.num_experts {EXPERTS} --moe.top_k {TOP_K} --moe.expert_dim {EXPERT_DIM}
--moe.shared_expert_dim {SHARED_DIM} --moe.shared_expert_gate true
--model.layers.N.qk_norm true --model.layers.N.output_gate true --model.layers.N.rotary_fraction 0.25
""".split()

VOCAB_OF_SMALL = 512
SMALL = """
--model.dim 128 --model.num_layers 2 --model.num_heads 2 --model.layer_pattern L
--moe.num_experts 8 --moe.top_k 2 --moe.expert_dim 64 --training.dtype float32
""".split()


def our_step(dtype: str, batch_size: int, length: int, *overrides: str) -> Callable[[], None]:
    """Return a training step of torchlmoe's model, as the trainer runs it."""
    keep_freed_pages()
    return steps_of(load_config([*SIZES, "--training.dtype", dtype, *overrides]), VOCAB)(batch_size, length)


def steps_of(config: Config, vocab_size: int) -> Callable[[int, int], Callable[[], None]]:
    """Build the model and its optimizer. Returns a function: batch size, length -> a step on random tokens."""
    device = choose_device("auto")
    start_process_group(device)
    model = build_model(config, vocab_size, Ranks(config.parallelism, device.type), device)
    optimizer = build_optimizer(model, config.optimizer)

    def step_of(batch_size: int, length: int) -> Callable[[], None]:
        tokens, labels = (torch.randint(vocab_size, (batch_size, length), device=device) for _ in range(2))
        bounds = torch.tensor([[0, length]] * batch_size, dtype=torch.int32, device=device)

        def step() -> None:
            (model(tokens, bounds, labels) / labels.numel()).backward()
            clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return step_of


def flops_per_token(length: int) -> int:
    """Return the FLOPs of a training step per token: three times those of the forward."""
    return 3 * build_on_meta(load_config(SIZES), VOCAB).flops_per_token(length)


def qwen3_next_step(dtype: str, batch_size: int, length: int, experts: str, keeps_pages: bool) -> Callable[[], None]:
    """Return a training step of transformers' model with parameters in `dtype`."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM  # imported here, since it takes seconds

    if keeps_pages:
        keep_freed_pages()
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=HEAD_DIM,
        linear_value_head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=EXPERT_DIM,
        shared_expert_intermediate_size=SHARED_DIM,
        output_router_logits=True,
        use_cache=False,
        experts_implementation=experts,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3NextForCausalLM(config).to(device, getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(VOCAB, (batch_size, length), device=device)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def beside_transformers(repeats: int, output: Path | None) -> None:
    rows = []
    length, batch_size = 1024, 2
    dtypes = ["float32"]
    if choose_device("auto").type == "cuda" or not cpu_lacks_bfloat16():
        dtypes.append("bfloat16")
    else:
        print("This CPU has no bfloat16 matrix instructions: only float32 is measured.")
    for dtype in dtypes:
        cases = {"torchlmoe": Worker(our_step, dtype, batch_size, length)}
        for experts in ("eager", "grouped_mm"):
            for keeps_pages in (False, True):
                name = f"transformers {experts}" + (" kept pages" if keeps_pages else "")
                cases[name] = Worker(qwen3_next_step, dtype, batch_size, length, experts, keeps_pages)
        seconds = interleaved_seconds(cases, repeats=repeats)
        close(cases)
        rate = matmul_rate(getattr(torch, dtype))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            speed = batch_size * length / median
            rows.append(
                {
                    "model": name,
                    "dtype": dtype,
                    "tokens/s": round(speed),
                    "of matmul rate": speed * flops_per_token(length) / rate,
                    "torchlmoe / it": median / medians["torchlmoe"],
                }
            )
    sizes = f"LLLN hybrid of {LAYERS} blocks, dim {DIM}, {EXPERTS} experts top-{TOP_K}, {batch_size} x {length} tokens"
    show(f"Train step beside Qwen3-Next: {sizes}", rows, output)


def over_lengths(repeats: int, output: Path | None) -> None:
    """Tokens/s relative to the shortest rows, and the bytes of tensors that a step keeps per token of one long row."""
    keep_freed_pages()
    rows, most_tokens = [], max(LENGTHS)
    for mixer in MIXERS:
        step_of = steps_of(load_config([*SMALL, "--model.mixer", mixer]), VOCAB_OF_SMALL)
        cases = {str(length): step_of(most_tokens // length, length) for length in LENGTHS}
        seconds = interleaved_seconds(cases, repeats=repeats, warmups=1)
        speeds = {name: most_tokens / statistics.median(times) for name, times in seconds.items()}
        ratios = {f"T = {name}": speed / speeds[str(LENGTHS[0])] for name, speed in speeds.items()}
        peaks = [peak_bytes(step_of(1, length)) for length in LENGTHS]
        slopes = [(peaks[i + 1] - peaks[i]) / (LENGTHS[i + 1] - LENGTHS[i]) / 1024 for i in (0, len(LENGTHS) - 2)]
        rows.append({"mixer": mixer, **ratios, "KiB/token, short": slopes[0], "KiB/token, long": slopes[1]})
        print(*rows[-1].values(), flush=True)
    sizes = " ".join(SMALL)
    show(f"Tokens/s over that at T = {LENGTHS[0]}, {most_tokens} tokens a step, float32: {sizes}", rows, output)


def peak_bytes(step: Callable[[], None]) -> int:
    """Return the peak bytes of tensors that a step makes, without those inside torchlmoe's operations."""
    with PeakBytes() as peak:
        step()
    return peak.most


PARTS = {"beside": beside_transformers, "lengths": over_lengths}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each model")
    parser.add_argument("--part", choices=PARTS, help="one of the two tables; both if unset")
    options = parser.parse_args()
    for name, part in PARTS.items():
        if options.part in (None, name):
            part(options.repeats, options.output and options.output.with_stem(f"{options.output.stem}_{name}"))


def close(workers: dict[str, Worker]) -> None:
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    # Nothing is downloaded here, and transformers must not try.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
