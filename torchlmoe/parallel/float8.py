"""Runs products of the blocks in low precision, through torchao. Weights and results keep their dtype.

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
_MULTIPLE = 16  # float8 products need inputs and outputs that are multiples of it


def convert_to_float8(model: Decoder, settings: Float8, device: torch.device, heads: DeviceMesh | None = None) -> None:
    """Makes the blocks' linear layers multiply in float8. Hardware without float8 emulates it, with a warning.

    Routed experts, the head and modules marked `float32_island` stay as they are, and so do layers with a width that is
    not a multiple of 16, with a warning that names them.

    heads: the ranks of tensor parallelism, if any; widths are then those of a rank's part. The "tensorwise" recipe uses
        the scale of the whole tensor; others scale each rank's part of a row.
    Hooks and attributes of a layer stay. Make the plan of tensor parallelism before this, and apply it afterwards.
    """
    # Imported here, since torchao takes a second and warns of kernels that it cannot load.
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

    originals = dict(model.blocks.named_modules())
    convert_to_float8_training(model.blocks, module_filter_fn=is_converted, config=config)
    for name, layer in model.blocks.named_modules():
        original = originals[name]
        if layer is original:
            continue
        # torchao does not copy hooks and attributes.
        missing = {key: value for key, value in vars(original).items() if "hook" in key or key not in vars(layer)}
        vars(layer).update(missing)
        dim = _split_dim(original)
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
    """Makes the routed experts multiply in MXFP8. A CPU emulates it, with a warning.

    is_compiled: whether blocks will be compiled.

    Raises ValueError on a GPU without the format or without torchao's kernels, on a CPU if blocks will be compiled, for
    a model without routed experts, and for experts whose widths are not multiples of 32.
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
    """The dimension of heads in the layer's weight; None if tensor parallelism does not split it."""
    return getattr(layer, "head_dims", {}).get("weight")


def _local_shape(layer: nn.Linear, degree: int) -> list[int]:
    """Outputs and inputs of the part that one of `degree` ranks computes with; ranks may share a unit."""
    shape = [layer.out_features, layer.in_features]
    dim = _split_dim(layer)
    if dim is not None:
        shape[dim] //= min(degree, getattr(layer, "units", None) or degree)
    return shape
