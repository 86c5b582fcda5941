"""Time of a step: each operation takes the longer of its computation and memory time, each message its link's time.

Assumptions, besides a device's rates (gpus.py):

- an operation takes what its FLOPs take at a fraction of the matrix rate, or its bytes at a fraction of the memory's,
  the longer of the two, and at least the time of starting it; operations are not fused;
- a ring collective over n ranks sends (n - 1) / n of its bytes, an all-reduce twice as much; an all-to-all as a ring;
- an axis whose ranks are spread over more than one node moves its bytes at the network's rate;
- what FSDP gathers and reduces runs beside the computation, and takes time only so far as it takes longer; all other
  messages are waited for, and all are if the device computes them itself (a CPU).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torchlmoe.planning.communication import Message
from torchlmoe.planning.gpus import GPU
from torchlmoe.planning.work import Task

PRODUCT_FRACTION = (
    0.7  # of the matrix rate, in products: what large ones reach on an H100 (769-798 of 989 TFLOP/s), less
)
OTHER_FRACTION = 0.25  # in recurrences and attention
MEMORY_FRACTION = 0.8
LINK_FRACTION = 0.8
FSDP_AXES = ("dp_replicate", "dp_shard", "dp_shard_cp", "efsdp")


@dataclass(frozen=True)
class Machine:
    """gpu: of every rank. ranks_per_node: neighbours with the fast link. strides: by axis, from a rank to its next
    neighbour on it.
    """

    gpu: GPU
    ranks_per_node: int
    strides: Mapping[str, int]

    def seconds_of(self, task: Task) -> float:
        fraction = PRODUCT_FRACTION if task.is_product else OTHER_FRACTION
        computing = task.flops / (self.gpu.matmul_rate(task.dtype) * fraction)
        moving = task.num_bytes / (self.gpu.memory_rate * MEMORY_FRACTION)
        return max(computing, moving, self.gpu.seconds_to_start)

    def seconds_to_send(self, message: Message) -> float:
        n, num_bytes = message.num_ranks, float(message.num_bytes)
        if message.collective != "send":
            num_bytes *= (n - 1) / n * (2 / self.gpu.reduced_rate if message.collective == "all_reduce" else 1)
        within = self.strides.get(message.axis, 1) * n <= self.ranks_per_node
        rate = self.gpu.link if within else self.gpu.network
        return self.gpu.seconds_of_message + num_bytes / (rate * LINK_FRACTION)

    def beside(self, computing: float, messages: Counter[Message]) -> float:
        """Seconds that FSDP's messages take longer than the computation that they run beside."""
        sending = self.sending(messages, fsdp=True)
        return max(0.0, sending - computing) if self.gpu.overlaps else sending

    def computing(self, tasks: Counter[Task]) -> float:
        return sum(self.seconds_of(task) * count for task, count in tasks.items())

    def sending(self, messages: Counter[Message], *, fsdp: bool) -> float:
        """Of FSDP's messages, or of all others, but those between stages of a pipeline."""
        return sum(
            self.seconds_to_send(message) * count
            for message, count in messages.items()
            if message.axis != "pp" and (message.axis in FSDP_AXES) == fsdp
        )
