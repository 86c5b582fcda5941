"""A float8 linear layer that is split over ranks, with the scales of the whole layer.

torchao scales an operand by its largest magnitude. For a DTensor it takes the largest one on all ranks, so the product
takes the parts as DTensors. The code around the layer computes with plain tensors.

Import this file only if float8 is enabled: torchao takes a second, and warns of kernels that it cannot load.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args


class Float8LinearPart(Float8Linear):
    """x [..., in] -> [..., out], where the ranks of `mesh` have parts of the weight [out, in] along `dim`.

    dim 0: x is whole and the output is a part, as is its gradient. dim 1: x is a part; the output is a term of a sum
    over ranks, whose gradient is whole.
    """

    mesh: DeviceMesh
    dim: int

    def forward(self, x: Tensor) -> Tensor:
        is_row = self.dim == 1
        channels = Shard(x.dim() - 1)
        placement, grad_placement = (channels, channels) if is_row else (Replicate(), Partial())
        x = DTensor.from_local(x, self.mesh, [placement], run_check=False, grad_placements=[grad_placement])
        weight = DTensor.from_local(self.weight, self.mesh, [Shard(self.dim)], run_check=False)
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.linear_mm_config, self.config)
        y = y.to_local(grad_placements=[Replicate() if is_row else channels])
        return y if self.bias is None else y + self.bias
