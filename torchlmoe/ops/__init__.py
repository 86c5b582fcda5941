"""Ground floor: pure functions on tensors."""

from torchlmoe.ops.elementwise_recurrence import (
    elementwise_flops_per_token,
    elementwise_recurrence,
    elementwise_span_summary,
)
from torchlmoe.ops.linear_recurrence import linear_recurrence, recurrence_flops_per_token, span_summary

__all__ = [
    "elementwise_flops_per_token",
    "elementwise_recurrence",
    "elementwise_span_summary",
    "linear_recurrence",
    "recurrence_flops_per_token",
    "span_summary",
]
