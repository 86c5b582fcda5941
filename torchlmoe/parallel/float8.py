"""Linear layers of the blocks in float8 (arXiv 2209.05433), through torchao: weights and results keep their dtype."""

import dataclasses
import logging

import torch
from torch import nn

from torchlmoe.config.settings import Float8
from torchlmoe.model.decoder import Decoder

logger = logging.getLogger(__name__)
_MULTIPLE = 16  # of both widths, which float8 products need


def convert_to_float8(model: Decoder, settings: Float8, device: torch.device) -> None:
    """Products of the blocks' linear layers run on operands scaled to float8; on emulated ones without such hardware.

    Left out are the routed experts (grouped products), the head, modules marked `float32_island` and, said by name,
    layers with a width that is not a multiple of 16.
    """
    # Imported here, because it takes a second and warns of kernels that it cannot load.
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(settings.recipe)
    needed = (9, 0) if settings.recipe == "rowwise" else (8, 9)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < needed:
        logger.warning(
            f"float8.recipe = {settings.recipe!r} is emulated on this device: float8's rounding, not its speed."
        )
        config = dataclasses.replace(config, emulate=True)
    islands = [module for module in model.modules() if getattr(module, "float32_island", False)]
    in_islands = {inner for island in islands for inner in island.modules()}
    unfit: dict[str, list[str]] = {}

    def is_converted(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        if module in in_islands:
            return False
        fits = module.in_features % _MULTIPLE == module.out_features % _MULTIPLE == 0
        if not fits:
            block, _, layer = name.partition(".")
            unfit.setdefault(f"{layer} ({module.in_features} x {module.out_features})", []).append(block)
        return fits

    convert_to_float8_training(model.blocks, module_filter_fn=is_converted, config=config)
    for layer, blocks in unfit.items():
        logger.warning(
            f"{layer} of blocks {', '.join(blocks)} is not in float8: its widths are not multiples of {_MULTIPLE}."
        )
