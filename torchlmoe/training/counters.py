"""Collects the counts of all routed layers in a step. Every rank has one vector, laid out for the whole model."""

from typing import Any

import torch
from torch import Tensor

from torchlmoe.model.decoder import Decoder
from torchlmoe.training.metrics import load_figures

_SCALARS = ("dropped", "aux_loss", "z_loss")


class Counters:
    """sizes: name of a layer -> its number of experts or memories, in the model's order."""

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes

    def pop(self, model: Decoder, device: torch.device) -> Tensor:
        """Return and reset this rank's counts since the last call, as a float64 vector; zero for layers of other ranks.

        Counts stay exact, since they are far below 2^53.
        """
        layers = model.routed_layers()
        parts = []
        for name, size in self.sizes.items():
            if name in layers:
                counted = layers[name].pop_counters()
                parts += [counted["counts"].double(), *(counted[key].double()[None] for key in _SCALARS)]
            else:
                parts.append(torch.zeros(size + len(_SCALARS), dtype=torch.float64, device=device))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)

    def by_layer(self, totals: Tensor) -> dict[str, dict[str, Tensor]]:
        """Layer -> counts [E], dropped, aux_loss and z_loss. totals: the sum of all ranks' vectors."""
        rows = totals.split([size + len(_SCALARS) for size in self.sizes.values()])
        return {
            name: {"counts": row[:size], **dict(zip(_SCALARS, row[size:], strict=True))}
            for (name, size), row in zip(self.sizes.items(), rows, strict=True)
        }

    def figures(self, totals: Tensor) -> dict[str, Any]:
        """The figures to log, by name. totals: the sum of all ranks' vectors."""
        figures: dict[str, Any] = {}
        for name, layer in self.by_layer(totals).items():
            of_layer = {
                **load_figures(layer["counts"]),
                "aux_loss": layer["aux_loss"].item(),
                "z_loss": layer["z_loss"].item(),
                "dropped_fraction": (layer["dropped"] / layer["counts"].sum()).item(),
            }
            figures |= {f"{name}/{key}": value for key, value in of_layer.items()}
        return figures
