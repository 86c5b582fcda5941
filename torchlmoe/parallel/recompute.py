"""Activation recompute: a block keeps little of its forward and runs it again for its backward (arXiv 1604.06174)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten._scaled_mm,
    aten._grouped_mm,
    aten._scaled_grouped_mm,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}
# The choice of experts is kept: recomputed scores may round differently and choose other experts.
_CHOICES = {"torchlmoe::top_indices", "torchlmoe::sort_slots", "torchlmoe::exchange_counts"}
# Our operations that are as cheap as elementwise ones.
_POINTWISE = {
    f"torchlmoe::{name}"
    for name in ("causal_conv", "weighted_swiglu", "gather_slots", "permute", "gated_rms_norm", "decay_gate")
}


def _policy(selective: bool, context, operation, *args, **kwargs) -> CheckpointPolicy:
    name = operation.name().partition(".")[0]
    keep = name in _CHOICES
    if selective:
        ours = name.startswith(("torchlmoe::", "torch_attn::")) and name.removesuffix("_triton") not in _POINTWISE
        keep = keep or ours or operation.overloadpacket in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# One each, so that equal blocks stay equal to `torch.compile`.
_CONTEXTS = {
    mode: partial(create_selective_checkpoint_contexts, partial(_policy, mode == "selective"))
    for mode in ("selective", "full")
}


def recompute(block: nn.Module, mode: str) -> None:
    """From now on `block` runs its forward again in its backward.

    mode: "selective" keeps the results of products and of our operations (recurrence, attention, experts) and
    recomputes what is cheap; "full" keeps the block's input and which experts were chosen.
    """
    # A partial of the bound forward, not a closure, so that a deep copy of the block runs its own. It is no wrapper
    # around the block, so that names stay.
    block.forward = partial(_run_again, mode, block.forward)  # type: ignore[method-assign]


def _run_again(mode: str, forward: Callable, *args, **kwargs):
    # Nothing in a block draws random numbers, so their state need not be kept.
    contexts = _CONTEXTS[mode]
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)
