"""Products of the blocks in low precision, through torchao: weights and results keep their dtype.

Linear layers run in float8 (arXiv 2209.05433), and routed experts in MXFP8 (OCP Microscaling Formats 1.0).
"""

import dataclasses
import logging

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.config.settings import Float8
from torchlmoe.feed_forwards.experts import Experts
from torchlmoe.model.decoder import Decoder
from torchlmoe.ops.mxfp8_matmul import BLOCK, mxfp8_grouped_matmul, why_mxfp8_cannot_run

logger = logging.getLogger(__name__)
_MULTIPLE = 16  # of both widths, which float8 products need


def convert_to_float8(model: Decoder, settings: Float8, device: torch.device, heads: DeviceMesh | None = None) -> None:
    """Products of the blocks' linear layers run on operands scaled to float8; on emulated ones without such hardware.

    Left out are the routed experts, the head, modules marked `float32_island` and, said by name, layers with a width
    that is not a multiple of 16.

    heads: ranks that heads and hidden channels are going to be split over. What counts is then the width of a rank's
    part. With one scale for a tensor, it is that of the whole tensor; rows that are cut have a scale on each rank.
    Hooks and attributes of a layer stay. Make the plan of tensor parallelism before, and apply it afterwards.
    """
    # Imported here, because it takes a second and warns of kernels that it cannot load.
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    from torchlmoe.parallel.float8_linear import Float8LinearPart

    config = Float8LinearConfig.from_recipe_name(settings.recipe)
    needed = (9, 0) if settings.recipe == "rowwise" else (8, 9)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < needed:
        logger.warning(
            f"float8.recipe = {settings.recipe!r} is emulated on this device: float8's rounding, not its speed."
        )
        config = dataclasses.replace(config, emulate=True)
    degree = 1 if heads is None else heads.size()
    islands = [module for module in model.modules() if getattr(module, "float32_island", False)]
    in_islands = {inner for island in islands for inner in island.modules()}
    unfit: dict[str, list[str]] = {}

    def is_converted(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        if module in in_islands:
            return False
        outputs, inputs = _local_shape(module, degree)
        fits = inputs % _MULTIPLE == outputs % _MULTIPLE == 0
        if not fits:
            block, _, layer = name.partition(".")
            unfit.setdefault(f"{layer} ({inputs} x {outputs})", []).append(block)
        return fits

    before = dict(model.blocks.named_modules())
    convert_to_float8_training(model.blocks, module_filter_fn=is_converted, config=config)
    for name, layer in model.blocks.named_modules():
        exact = before[name]
        if layer is exact:
            continue
        # Hooks and attributes, which torchao leaves behind.
        kept = {key: value for key, value in vars(exact).items() if "hook" in key or key not in vars(layer)}
        vars(layer).update(kept)
        dim = _split_dim(exact)
        if degree > 1 and dim is not None and settings.recipe == "tensorwise":
            layer.__class__ = Float8LinearPart
            layer.mesh, layer.dim = heads, dim
    on_a_rank = f" on each of {degree} ranks" * (degree > 1)
    for layer_name, blocks in unfit.items():
        logger.warning(
            f"{layer_name} of blocks {', '.join(blocks)} is not in float8: its widths{on_a_rank} are not multiples of "
            f"{_MULTIPLE}."
        )


def convert_experts_to_mxfp8(model: Decoder, device: torch.device, is_compiled: bool = False) -> None:
    """Grouped products of the routed experts run in MXFP8, which a CPU emulates.

    is_compiled: whether blocks are going to be compiled.

    Raises ValueError where they cannot: without torchao's kernels or a GPU that has the format, where the emulation
    would be compiled, for a model without routed experts, and for experts whose widths are not multiples of 32.
    """
    setting = "float8.experts = 'mxfp8'"
    if reason := why_mxfp8_cannot_run(device):
        raise ValueError(f"{setting} {reason}; leave it at 'none'.")
    if device.type == "cpu":
        if is_compiled:
            raise ValueError(
                f"{setting} is emulated on a CPU, which compile.enable = true cannot compile; leave one of the two off."
            )
        logger.warning(f"{setting} is emulated on this device: the format's rounding, not its speed.")
    of_blocks = [
        (index, module)
        for index, block in model.blocks.items()
        for module in block.modules()
        if isinstance(module, Experts)
    ]
    if not of_blocks:
        raise ValueError(f"{setting} has no effect on a model without routed experts; leave it at 'none'.")
    for index, experts in of_blocks:
        dim, hidden = experts.down_proj.shape[1:]
        if dim % BLOCK or hidden % BLOCK:
            letter, _ = model.places_in_common[index]
            raise ValueError(
                f"{setting} needs widths that are multiples of {BLOCK}, but the experts of model.layers.{letter} have "
                f"a width of {dim} and a hidden width of {hidden}; change model.dim or expert_dim, or leave it at "
                "'none'."
            )
        experts.matmul = mxfp8_grouped_matmul


def _split_dim(layer: nn.Module) -> int | None:
    """The dimension of the weight along which heads are laid."""
    return getattr(layer, "head_dims", {}).get("weight")


def _local_shape(layer: nn.Linear, degree: int) -> list[int]:
    """Outputs and inputs of the part that one of `degree` ranks computes with; ranks may have a unit together."""
    shape = [layer.out_features, layer.in_features]
    dim = _split_dim(layer)
    if dim is not None:
        shape[dim] //= min(degree, getattr(layer, "units", None) or degree)
    return shape
