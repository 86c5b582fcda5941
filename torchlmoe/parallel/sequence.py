"""The place of `LSMSequenceParallel` in earlier versions; it is in `torchlmoe.styles.recurrence`."""

from torchlmoe.styles.recurrence import ElementwiseSequenceParallel, LSMSequenceParallel, StateRing

__all__ = ["ElementwiseSequenceParallel", "LSMSequenceParallel", "StateRing"]
