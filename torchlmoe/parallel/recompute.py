"""Activation recompute (arXiv 1604.06174): a block keeps few activations and runs its forward again in the backward."""

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
# torchlmoe's operations that are as cheap as elementwise ones.
_POINTWISE = {
    f"torchlmoe::{name}"
    for name in ("causal_conv", "weighted_swiglu", "gather_slots", "permute", "gated_rms_norm", "decay_gate")
}


def _policy(selective: bool, context, operation, *args, **kwargs) -> CheckpointPolicy:
    name = operation.name().partition(".")[0]
    keep = name in _CHOICES
    if selective:
        is_custom = name.startswith(("torchlmoe::", "torch_attn::"))
        is_costly = is_custom and name.removesuffix("_triton") not in _POINTWISE
        keep = keep or is_costly or operation.overloadpacket in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# One object per mode, so that `torch.compile` reuses the code of equal blocks.
_CONTEXTS = {
    mode: partial(create_selective_checkpoint_contexts, partial(_policy, mode == "selective"))
    for mode in ("selective", "full")
}


def recompute(block: nn.Module, mode: str) -> None:
    """Makes `block` run its forward again in its backward.

    mode: "selective" keeps the results of products and of custom operations (recurrence, attention, experts) and
    recomputes cheap operations; "full" keeps only the block's input and the choice of experts.
    """
    # A partial of the bound forward, not a closure, so that a deep copy of the block runs its own forward. It does not
    # wrap the block, so that names of parameters stay.
    block.forward = partial(_run_again, mode, block.forward)  # type: ignore[method-assign]


def _run_again(mode: str, forward: Callable, *args, **kwargs):
    # Blocks draw no random numbers, so the generator's state need not be saved.
    contexts = _CONTEXTS[mode]
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)
