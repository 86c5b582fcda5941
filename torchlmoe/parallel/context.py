"""Context parallelism: splits a microbatch into contiguous spans of tokens, one per rank.

Mixers look across tokens only in submodules that have a parallel style for it (`Mixer.context_parallel_plan`). The rest
of a model works token by token. There are two exceptions: the token shift before a feed-forward layer (`apply_halos`),
and the loads of a row, which are summed over its spans.
"""

from dataclasses import replace

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from torchlmoe.config.settings import Parallelism
from torchlmoe.model.decoder import Decoder
from torchlmoe.styles.attention import AttentionSequenceParallel
from torchlmoe.styles.halo import Halo, TokenShiftHalo


def context_parallel_plans(model: Decoder, settings: Parallelism, span: int) -> dict[str, dict[str, ParallelStyle]]:
    """Block -> styles of its mixer's submodules by name.

    span: number of tokens in the shortest span. Raises ValueError if a mixer cannot be split, or looks back further.
    """
    plans, degree = {}, settings.context_parallel_degree
    for index, block in model.blocks.items():
        mixer, (letter, _) = block.mixer, model.places_in_common[index]
        if mixer is None:
            continue  # a block without a mixer needs only `apply_halos`
        lsm, attention = settings.lsm_context_parallel, settings.attention_context_parallel
        plan = mixer.context_parallel_plan(lsm=lsm, attention=attention)  # type: ignore[operator,union-attr]
        if not plan:
            raise ValueError(
                f"parallelism.context_parallel_degree = {degree} cannot split the "
                f"{type(mixer).__name__} of model.layers.{letter} with lsm_context_parallel = {lsm!r} and "
                f"attention_context_parallel = {attention!r}; choose another way, another mixer or degree 1."
            )
        for name, style in plan.items():
            if isinstance(style, AttentionSequenceParallel) and style.communication == "ulysses":
                _check_heads(settings, letter, (style.num_heads or 0) * model.span.pieces)
            reach = style.width(mixer.get_submodule(name)) if isinstance(style, Halo) else 0  # type: ignore[union-attr]
            if reach > span:
                raise ValueError(
                    f"parallelism.context_parallel_degree = {degree} leaves spans of {span} "
                    f"tokens, and {name} of model.layers.{letter} looks back {reach}; choose a lower degree or longer "
                    "rows."
                )
        plans[index] = plan
    return plans


def _check_heads(settings: Parallelism, letter: str, num_heads: int) -> None:
    """num_heads: of the whole model. Tensor parallelism divides them first."""
    spans, parts = settings.context_parallel_degree, settings.tensor_parallel_degree
    if num_heads % (spans * parts):
        times = f" times tensor_parallel_degree = {parts}" if parts > 1 else ""
        raise ValueError(
            f"parallelism.context_parallel_degree = {spans}{times} does not divide the {num_heads} heads of "
            f"model.layers.{letter}, which attention_context_parallel = 'ulysses' spreads; choose a divisor, or "
            "'all_gather'."
        )


def apply_context_parallel(model: Decoder, mesh: DeviceMesh, settings: Parallelism, span: int) -> None:
    """Makes each rank of `mesh` work on its span of every microbatch. span, errors: see `context_parallel_plans`."""
    for index, plan in context_parallel_plans(model, settings, span).items():
        parallelize_module(model.blocks[index].get_submodule("mixer"), mesh, plan)
    model.span = replace(model.span, index=mesh.get_local_rank(), number=mesh.size())


def apply_halos(model: Decoder, pieces: DeviceMesh) -> None:
    """Makes the token shift before a feed-forward layer receive the last token of the preceding rank.

    pieces: the ranks that have the pieces of a microbatch, under context and tensor parallelism.
    """
    for block in model.blocks.values():
        if block.feed_forward_shift is not None:
            shift = block.get_submodule("feed_forward_shift.token_shift")
            parallelize_module(shift, pieces, TokenShiftHalo())
