"""Tensor parallelism: splits the modules of a model over heads, as each of them declares.

Modules name the dimension of each parameter along which heads lie (`head_dims`), and their communication
(`tensor_parallel_style`). Between blocks every rank has a part of the tokens, on which norms, residuals and routers
run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.feed_forwards.experts import Experts
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.mixers.attention import InnerAttention
from torchlmoe.mixers.base import Mixer
from torchlmoe.model.decoder import Decoder
from torchlmoe.routing.balance import RoutedLayer
from torchlmoe.styles.heads import EnterHeads, HeadParameters
from torchlmoe.styles.vocabulary import VocabularyEmbedding, VocabularyHead

Plan = list[tuple[str, ParallelStyle]]  # (name of a module, its style), in the order of application


@dataclass(frozen=True)
class _Split:
    """A module whose parameters consist of `units`, which ranks can divide.

    name, module: for messages, the setting and the module. may_share: whether several ranks may have the same unit.
    """

    name: str
    module: str
    units: int
    may_share: bool

    def fits(self, degree: int) -> bool:
        return self.units % degree == 0 or (self.may_share and degree % self.units == 0)


def tensor_parallel_plan(model: Decoder, degree: int) -> Plan:
    """Returns the styles of all modules, in the order of application.

    Raises ValueError for heads that cannot be split over `degree` ranks, with the degrees that fit, for a module with
    parameters but without `head_dims`, and for a vocabulary with fewer rows than ranks need.
    """
    plan: Plan = []
    splits = list(_splits(model))
    for split in splits:
        if not split.fits(degree):
            most = max(x.units for x in splits)
            fitting = [str(other) for other in range(1, most + 1) if all(x.fits(other) for x in splits)]
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {degree} cannot split the {split.units} heads or channels of "
                f"{split.module} of {split.name}; degrees that fit this model: {', '.join(fitting)}."
            )
    for name, module in model.named_modules():
        if isinstance(module, Experts) or not list(module.parameters(recurse=False)):
            continue
        head_dims = getattr(module, "head_dims", None)
        if head_dims is None:
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {degree} cannot split {name} ({type(module).__name__}), which "
                "does not name in head_dims the dimension of its heads; define head_dims, or use degree 1."
            )
        plan.append((name, HeadParameters(head_dims, getattr(module, "units", None))))
    for name, module in model.named_modules():
        if hasattr(module, "tensor_parallel_style") and (style := module.tensor_parallel_style(degree)) is not None:  # type: ignore[operator]
            plan.append((name, style))
    for index, block in model.blocks.items():
        if block.mixer is not None:
            plan.append((f"blocks.{index}.mixer", EnterHeads()))
        plan += [(f"blocks.{index}.{name}", EnterHeads()) for name in _entrances("feed_forward", block.feed_forward)]  # type: ignore[arg-type]
    if "vocabulary" not in signature(model.spec.loss).parameters:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {degree} splits the vocabulary, but the loss of training.loss "
            "does not take the argument `vocabulary`, as cross_entropy does; use degree 1."
        )
    vocab_size = model.spec.vocab_size
    if -(-vocab_size // degree) * (degree - 1) >= vocab_size:  # rows per rank, times the ranks before the last one
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {degree} leaves a rank without any of the {vocab_size} rows of the "
            "vocabulary; choose a lower degree."
        )
    if hasattr(model, "embedding"):
        plan.append(("embedding", VocabularyEmbedding()))
    if hasattr(model, "head"):
        plan.append(("head", VocabularyHead(vocab_size)))
    return plan


def apply_tensor_parallel(model: Decoder, plan: Plan, mesh: DeviceMesh) -> None:
    """Splits heads over the ranks of `mesh`. Call `read_local_parts` after FSDP is applied."""
    rank, degree = mesh.get_local_rank(), mesh.size()
    for name, style in plan:
        style._apply(model.get_submodule(name), mesh)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.part_of_heads = (rank, degree)
        if isinstance(module, InnerAttention):
            module.num_heads //= degree
    for block in model.blocks.values():
        mixer, feed_forward = block.mixer, block.feed_forward
        if isinstance(mixer, RoutedLayer) and rank > 0:
            mixer.register_forward_pre_hook(_uncounted, with_kwargs=True)  # type: ignore[operator,union-attr]
        for layer in (block.feed_forward_shift, feed_forward):
            if layer is not None:
                layer.register_forward_pre_hook(partial(_piece, rank, degree), with_kwargs=True)  # type: ignore[operator,union-attr]
    model.shared_width //= degree
    model.span = replace(model.span, pieces=degree)


def _splits(model: Decoder) -> Iterator[_Split]:
    for index, block in model.blocks.items():
        letter, _ = model.places_in_common[index]
        for part in (block.mixer, block.feed_forward):
            for name, module in [] if part is None else part.named_modules():  # type: ignore[operator,union-attr]
                own = dict(module.named_parameters(recurse=False))
                if not own.keys() & getattr(module, "head_dims", {}).keys():
                    continue
                shared = getattr(module, "units", None)
                owner = _owner(part, name)  # type: ignore[arg-type]
                units = shared if shared is not None else getattr(owner, "units", None)
                if units is None:
                    units = min(own[key].shape[dim] for key, dim in module.head_dims.items() if key in own)  # type: ignore[union-attr]
                yield _Split(
                    f"model.layers.{letter}",
                    f"{name or 'the parameters'} ({type(owner).__name__})",
                    units,
                    shared is not None and module is not owner,
                )


def _owner(part: nn.Module, name: str) -> nn.Module:
    """The innermost module that contains module `name` and has a number of units; `part` if there is none."""
    owner = part
    path = ""
    for step in name.split(".")[:-1]:
        path = f"{path}.{step}" if path else step
        inner = part.get_submodule(path)
        if getattr(inner, "units", None) is not None:
            owner = inner
    return owner


def _entrances(name: str, module: nn.Module | None) -> list[str]:
    """Names of the outermost modules with a child that projects into hidden channels."""
    if module is None:
        return []
    if any(isinstance(child, ColumnLinear) for child in module.children()):
        return [name]
    return [inside for child, inner in module.named_children() for inside in _entrances(f"{name}.{child}", inner)]


def _piece(rank: int, degree: int, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]):
    """Pass a layer the layout of the rank's own tokens. Its balance losses are the rank's share of the span's."""
    sequence = options["sequence"]
    share = replace(sequence.share, loss_weight=sequence.share.loss_weight / degree)
    return inputs, {**options, "sequence": replace(sequence, share=share).span(rank, degree)}


def _uncounted(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]):
    """Turn off counting and balancing, since rank 0 does both: a mixer's router sees the same tokens on every rank."""
    sequence = options["sequence"]
    return inputs, {**options, "sequence": replace(sequence, share=replace(sequence.share, loss_weight=0.0))}
