"""Operations: pure functions on tensors, which know no modules."""

from torchlmoe.ops.elementwise_recurrence import (
    elementwise_flops_per_token,
    elementwise_recurrence,
    elementwise_span_summary,
)
from torchlmoe.ops.linear_recurrence import linear_recurrence, recurrence_flops_per_token
from torchlmoe.ops.online_gradient import online_gradient, online_gradient_flops_per_token
from torchlmoe.ops.span_summary import span_summary

__all__ = [
    "elementwise_flops_per_token",
    "elementwise_recurrence",
    "elementwise_span_summary",
    "linear_recurrence",
    "online_gradient",
    "online_gradient_flops_per_token",
    "recurrence_flops_per_token",
    "span_summary",
]
