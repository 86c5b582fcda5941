"""Keeps the import of `LSMSequenceParallel` of earlier versions; it is now in `torchlmoe.styles.recurrence`."""

from torchlmoe.styles.recurrence import ElementwiseSequenceParallel, LSMSequenceParallel, StateRing

__all__ = ["ElementwiseSequenceParallel", "LSMSequenceParallel", "StateRing"]
