"""The claims, the sizes at which they are checked, and the rules for a verdict. All are stated before anything is run.

Optimizer and steps of the recall claim were chosen by the training loss of short runs with seed 0, of pure, LN and
softmax models; its figures are of other seeds.

The error of a figure is two standard errors of its mean over seeds. For times it is the 95% range of the median. A rule
is checked over the whole range of figure ± error: the verdict is "held" if the rule holds everywhere, "not held" if it
holds nowhere, and "not decidable at this size" otherwise.
"""

from dataclasses import dataclass
from typing import Any

HELD, NOT_HELD, UNDECIDED = "held", "not held", "not decidable at this size"
MIXERS = ("gated_deltanet", "hgrn2", "mamba2", "gla", "rwkv7", "lightning")
MODEL = {"model.dim": 128, "model.num_layers": 4, "model.num_heads": 4}
SPARSE = {"moe.num_experts": 8, "moe.top_k": 2, "moe.expert_dim": 128}
# Of the claims about time.
TIMED = {"settings": {**MODEL, **SPARSE, "model.vocab_size": 4096}, "mixers": [*MIXERS, "attention"]}
# Training of the claims about loss.
TRAINING = {
    "training.steps": 400,
    "training.seq_len": 512,
    "training.global_batch_size": 2,
    "training.dtype": "float32",
    "lr_scheduler.warmup_steps": 20,
    "optimizer.lr": 3e-3,
}


@dataclass(frozen=True)
class Claim:
    """statement: the claim of the paper, in words. rule: when it is held. sizes: JSON object.

    remark: why the figures may be as they are, written after they were measured. It changes no verdict.
    """

    statement: str
    rule: str
    sizes: dict[str, Any]
    remark: str = ""


CLAIMS = {
    "throughput": Claim(
        "At equal tokens in a step, linear models train as fast on long rows as on short ones; softmax attention does "
        "not.",
        "Held if, for every linear mixer, the ratio of tokens/s at the longest rows to tokens/s at the shortest is at "
        "least 0.8, and the ratio of softmax attention is lower than each of these.",
        {**TIMED, "rows": [[512, 8], [1024, 4], [2048, 2], [4096, 1]], "repeats": 7, "least_ratio": 0.8},
    ),
    "decoding": Claim(
        "Time and memory of a decoded token do not grow with its position in linear models; with softmax attention "
        "both do.",
        "Held if, for every linear mixer, the cache has as many bytes at the last position as at the first and a "
        "token takes at most 1.05 times as long there, and with softmax attention it takes at least twice as long.",
        {
            **TIMED,
            "positions": [1024, 4096, 16384, 65536, 131072],
            "repeats": 400,
            "most_ratio": 1.05,
            "least_softmax_ratio": 2.0,
        },
    ),
    "recall": Claim(
        "Linear models recall less than softmax attention, depending on the size of their state; a few softmax blocks "
        "compensate for it.",
        "Held if, at the largest number of pairs, the largest pure linear model recalls more keys than the smallest, "
        "and the accuracy of every hybrid is at least the mean of those of the pure linear model and of the softmax "
        "model of its width.",
        {
            "mixer": "gated_deltanet",
            "settings": {
                "model.num_layers": 8,
                "model.num_heads": 2,
                "training.steps": 1000,
                "training.global_batch_size": 32,
                "training.dtype": "float32",
                "optimizer.lr": 4e-3,
                "lr_scheduler.warmup_steps": 30,
                "lr_scheduler.decay": "linear",
            },
            "patterns": {
                "pure": "LLLLLLLL",
                "LN": "LNLNLNLN",
                "LLLN": "LLLNLLLN",
                "N first": "NLLLLLLL",
                "N in the middle": "LLLNLLLL",
                "N last": "LLLLLLLN",
                "softmax": "NNNNNNNN",
            },
            "dims": [16, 32],
            "length": 64,
            "vocab_size": 64,
            "pairs": [4, 8, 15],
            "seeds": [1, 2],
            "documents": 512,
        },
        "Models that begin with a softmax block, or have softmax blocks only, had not learned the task after these "
        "steps at either width. Linear blocks have short convolutions, which give each token the one before it; "
        "softmax blocks must learn to find it. So the figures compare how fast models learn the task, not how much "
        "they can recall.",
    ),
    "loss": Claim(
        "At equal parameters and tokens, pure linear models come close to softmax attention, and hybrids reach it.",
        "Held if, at both lengths, the validation loss of the best pure linear model is at most 2% above that of "
        "softmax attention, and that of the best hybrid is not above it. Each model has the learning rate that "
        "torchlmoe.tune finds for it, and the width of experts with which its number of parameters is nearest to that "
        "of softmax attention.",
        {
            "mixers": list(MIXERS),
            "layouts": {"pure": "LLLL", "hybrid": "LLLN"},
            "settings": {**MODEL, **SPARSE, **TRAINING},
            "tune": {"tune.optimizer.lr": "2e-3,4e-3,8e-3,1.6e-2", "training.steps": 120, "rounds": 1},
            "lengths": [512, 1024],
            "seeds": [0, 1],
            "most_above": 0.02,
        },
        "The leaders have a path around the state (Mamba-2's D, RWKV-7's bonus), which matters most in short runs: "
        "[design](design.md) has a run without it. Of the mixers, only HGRN2's hybrid is ahead of its pure model "
        "at both lengths.",
    ),
    "experts": Claim(
        "At equal active parameters and tokens, a mixture of experts reaches a lower loss than a dense model.",
        "Held if the validation loss of the mixture is lower than the dense model's for every mixer.",
        {
            "mixers": ["gated_deltanet", "attention"],
            "settings": {**MODEL, **TRAINING},
            "feed_forwards": {
                "mixture": {"model.layers.L.mlp": "moe", **SPARSE},
                "dense": {
                    "model.layers.L.mlp": "dense",
                    "model.mlp_dim": SPARSE["moe.top_k"] * SPARSE["moe.expert_dim"],
                },
            },
            "seeds": [0, 1, 2],
        },
    ),
}


def verdict(checks: list[tuple[float, float, float]]) -> str:
    """Return the verdict of checks (figure, its error, limit), in which every figure must be at least its limit.

    It is undecided if the range of a figure contains its limit and no figure is below its limit by more than its error.
    """
    if any(figure + error < limit for figure, error, limit in checks):
        return NOT_HELD
    return HELD if all(figure - error >= limit for figure, error, limit in checks) else UNDECIDED
