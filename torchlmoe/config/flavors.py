"""Named sizes. A flavor is settings, below those of a TOML file and the command line.

`a0.3b_2b` and `a1b_7b` are the two models of the Linear-MoE paper (arXiv 2503.05447, table 2): Qwen2's vocabulary, 64
experts of which 8 are active, rotary softmax attention in every fourth block.
"""

from typing import Any

_PAPER: dict[str, dict[str, Any]] = {  # pure LSM blocks, as the counts of the paper; the recipes add softmax blocks
    "model": {"layer_pattern": "L", "vocab_size": 151_936, "init_std": 0.008, "tie_embeddings": False},
    "moe": {"num_experts": 64, "top_k": 8, "num_shared_experts": 0},
}

FLAVORS: dict[str, dict[str, dict[str, Any]]] = {
    "debug": {
        "model": {"layer_pattern": "LLLN", "dim": 192, "num_layers": 4, "num_heads": 3},
        "moe": {"num_experts": 16, "top_k": 2, "expert_dim": 128},
    },
    "a0.3b_2b": {
        "model": {**_PAPER["model"], "dim": 1024, "num_layers": 12, "num_heads": 8},
        "moe": {**_PAPER["moe"], "expert_dim": 896},
    },
    "a1b_7b": {
        "model": {**_PAPER["model"], "dim": 2048, "num_layers": 16, "num_heads": 16},
        "moe": {**_PAPER["moe"], "expert_dim": 1024},
    },
}
