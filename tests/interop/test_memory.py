"""A checkpoint of 8 GiB in five shards is converted in both directions within 2 GiB of memory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

LAYERS, EXPERTS, DIM, WIDTH, WORDS = 20, 8, 2048, 4096, 16_384


def write_mixtral(folder: Path) -> int:
    """Returns the bytes of its tensors."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=DIM, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_local_experts=EXPERTS,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=WORDS, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    weight_map, size = {}, 0
    for number in range(5):
        names = {name: shape for index in range(number * 4, number * 4 + 4) for name, shape in of_layer(index)}
        if number == 4:
            ends = {
                "model.embed_tokens.weight": (WORDS, DIM),
                "lm_head.weight": (WORDS, DIM),
                "model.norm.weight": (DIM,),
            }
            names |= ends
        tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in names.items()}
        file = f"model-{number + 1:05d}-of-00005.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return size


def of_layer(index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    layer = f"model.layers.{index}"
    for expert in range(EXPERTS):
        for name, shape in {"w1": (WIDTH, DIM), "w2": (DIM, WIDTH), "w3": (WIDTH, DIM)}.items():
            yield f"{layer}.block_sparse_moe.experts.{expert}.{name}.weight", shape
    yield f"{layer}.block_sparse_moe.gate.weight", (EXPERTS, DIM)
    for name, rows in {"q": DIM, "k": DIM // 4, "v": DIM // 4, "o": DIM}.items():
        yield f"{layer}.self_attn.{name}_proj.weight", (rows, DIM)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{layer}.{name}.weight", (DIM,)


# The most memory that was resident, mapped files included: of the program alone, unlike what `wait4` tells.
PEAK = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"


def peak_gib(program: str, *arguments: str) -> float:
    """Of a program of ours."""
    code = f"import sys; from torchlmoe import {program}; {program}.main(sys.argv[1:]); {PEAK}"
    printed = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return int(printed.stdout.split()[-1]) / 2**20


@pytest.mark.long
def test_eight_gibibytes(tmp_path):
    size = write_mixtral(tmp_path / "theirs")
    assert size > 8 * 2**30
    run = str(tmp_path / "run")
    peak = peak_gib("import_model", "--model", str(tmp_path / "theirs"), "--output", run)
    print("import", peak)
    assert peak < 2
    out = ["--output", str(tmp_path / "out"), "--format", "mixtral", "--max-shard-gib", "0.5"]
    peak = peak_gib("export", "--checkpoint", run, *out)
    print("export", peak)
    assert peak < 2
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == pytest.approx(size, rel=1e-4)
