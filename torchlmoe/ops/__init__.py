"""Ground floor: pure functions on tensors."""

from torchlmoe.ops.linear_recurrence import linear_recurrence, recurrence_flops_per_token, span_summary

__all__ = ["linear_recurrence", "recurrence_flops_per_token", "span_summary"]
