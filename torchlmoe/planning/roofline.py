"""Predicts the time of operations by a roofline model, and that of messages from the rate of their link.

Assumptions, besides a device's rates (gpus.py):

- An operation takes the longest of three times: its FLOPs at a fraction of the matrix rate, its bytes at a fraction of
  the memory rate, and the time to start it. Operations are not fused.
- A ring collective over n ranks, and an all-to-all, sends (n - 1) / n of its bytes; an all-reduce sends twice as much.
- If the ranks of an axis are spread over several nodes, its messages move at the rate of the network.
- FSDP's messages overlap with the computation, and cost only the time by which they exceed it. The computation waits
  for all other messages. On a CPU nothing overlaps.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torchlmoe.planning.communication import Message
from torchlmoe.planning.gpus import GPU
from torchlmoe.planning.work import Task

# Fraction of the matrix rate that products reach. Large ones reach more on an H100: 769-798 of 989 TFLOP/s.
PRODUCT_FRACTION = 0.7
OTHER_FRACTION = 0.25  # of the matrix rate, in recurrences and attention
MEMORY_FRACTION = 0.8
LINK_FRACTION = 0.8
FSDP_AXES = ("dp_replicate", "dp_shard", "dp_shard_cp", "efsdp")


@dataclass(frozen=True)
class Machine:
    """The devices of a run.

    gpu: every rank's device. ranks_per_node: number of ranks connected by the fast link. strides: by mesh axis, the
    difference between the ranks of two neighbors.
    """

    gpu: GPU
    ranks_per_node: int
    strides: Mapping[str, int]

    def seconds_of(self, task: Task) -> float:
        """Seconds that an operation takes."""
        fraction = PRODUCT_FRACTION if task.is_product else OTHER_FRACTION
        computing = task.flops / (self.gpu.matmul_rate(task.dtype) * fraction)
        moving = task.num_bytes / (self.gpu.memory_rate * MEMORY_FRACTION)
        return max(computing, moving, self.gpu.seconds_to_start)

    def seconds_to_send(self, message: Message) -> float:
        """Seconds that a message takes."""
        n, num_bytes = message.num_ranks, float(message.num_bytes)
        if message.collective != "send":
            num_bytes *= (n - 1) / n * (2 / self.gpu.reduced_rate if message.collective == "all_reduce" else 1)
        within = self.strides.get(message.axis, 1) * n <= self.ranks_per_node
        rate = self.gpu.link if within else self.gpu.network
        return self.gpu.seconds_of_message + num_bytes / (rate * LINK_FRACTION)

    def beside(self, computing: float, messages: Counter[Message]) -> float:
        """Seconds by which FSDP's messages exceed the computation that they overlap with."""
        sending = self.sending(messages, fsdp=True)
        return max(0.0, sending - computing) if self.gpu.overlaps else sending

    def computing(self, tasks: Counter[Task]) -> float:
        """Seconds that all tasks take, one after another."""
        return sum(self.seconds_of(task) * count for task, count in tasks.items())

    def sending(self, messages: Counter[Message], *, fsdp: bool) -> float:
        """Seconds of FSDP's messages or, with fsdp = False, of all others except those between pipeline stages."""
        return sum(
            self.seconds_to_send(message) * count
            for message, count in messages.items()
            if message.axis != "pp" and (message.axis in FSDP_AXES) == fsdp
        )
