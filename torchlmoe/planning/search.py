"""Searches the fastest layouts that a model and its batch allow: estimates all of them and traces the best."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torchlmoe.config.batch import check_degrees, ranks_of_rows
from torchlmoe.config.settings import Config, Parallelism
from torchlmoe.parallel.parallelize import whole_model
from torchlmoe.planning.estimate import Sizes, estimate
from torchlmoe.planning.gpus import GPU
from torchlmoe.planning.layout import USABLE_FRACTION, Plan, make_plan


def legal_layouts(config: Config, vocab_size: int, world_size: int) -> Iterator[Config]:
    """Yields the settings with each combination of degrees that `check_degrees` and `whole_model` accept.

    All other settings (schedule, kinds of context parallelism, batch) stay.
    """
    # Whether whole_model accepts a degree does not depend on other axes, except for context parallelism: the length of
    # a span depends on the number of data ranks.
    fits: dict[tuple[str, int, int], bool] = {}
    for degrees in _combinations(config.parallelism, world_size):
        layout = replace(config, parallelism=degrees)
        try:
            check_degrees(layout, world_size)
        except ValueError:
            continue
        data_ranks = world_size // ranks_of_rows(layout)
        for axis in ("pipeline", "context", "tensor", "expert"):
            name = f"{axis}_parallel_degree"
            key = (axis, degree := getattr(degrees, name), data_ranks if axis == "context" else 0)
            if key not in fits:
                alone = replace(_one_of_each(degrees), **{name: degree})
                fits[key] = _is_legal(replace(config, parallelism=alone), vocab_size, data_ranks * degree)
            if not fits[key]:
                break
        else:
            yield layout


def search(
    config: Config,
    vocab_size: int,
    world_size: int,
    gpu: GPU,
    gpu_name: str,
    ranks_per_node: int,
    tell: Callable[[Plan], None],
    num_traced: int = 16,
) -> tuple[list[Plan], int]:
    """Returns plans of the fastest layouts, and the number of legal layouts.

    Legal layouts are sorted by the time that `estimate` gives. Of those whose parameters, gradients and optimizer state
    fit, at most the first `num_traced` are traced. Tracing stops at a layout whose estimate is slower than a traced
    plan that fits. Plans that fit come first, sorted by predicted time; the others follow, sorted by peak memory.

    gpu: every rank's device; gpu_name: its name in messages. tell: called with each plan as soon as it is traced.
    Raises ValueError if no layout is legal, or if no layout's state fits.
    """
    legal = list(legal_layouts(config, vocab_size, world_size))
    if not legal:
        raise ValueError(
            f"--world-size {world_size} has no layout that the model and training.global_batch_size = "
            f"{config.training.global_batch_size} allow; choose another number of ranks or another batch."
        )
    sizes = Sizes.of(whole_model(legal[0], vocab_size, world_size), config.training.seq_len)
    estimates = [estimate(layout, sizes, world_size, gpu, ranks_per_node) for layout in legal]
    possible = [
        index for index, guess in enumerate(estimates) if guess.peak_bytes <= USABLE_FRACTION * gpu.memory_bytes
    ]
    if not possible:
        least = min(guess.peak_bytes for guess in estimates)
        raise ValueError(
            f"--world-size {world_size} is too few: parameters, gradients and the optimizer's state take "
            f"{least / 2**30:.2f} GiB of each rank or more, and {gpu_name} has {gpu.memory_bytes / 2**30:.2f} GiB; "
            "choose more ranks."
        )
    plans: list[Plan] = []
    for index in sorted(possible, key=lambda index: estimates[index].seconds)[:num_traced]:
        fastest = min((plan.seconds_per_step for plan in plans if plan.fits), default=float("inf"))
        if estimates[index].seconds > fastest:
            break
        plans.append(make_plan(legal[index], vocab_size, world_size, gpu, gpu_name, ranks_per_node))
        tell(plans[-1])
    in_order = sorted(plans, key=lambda plan: (not plan.fits, plan.seconds_per_step if plan.fits else plan.peak_bytes))
    return in_order, len(legal)


def _is_legal(config: Config, vocab_size: int, world_size: int) -> bool:
    try:
        whole_model(config, vocab_size, world_size)
    except ValueError:
        return False
    return True


def _one_of_each(parallelism: Parallelism) -> Parallelism:
    return replace(
        parallelism,
        pipeline_parallel_degree=1,
        data_parallel_replicate_degree=1,
        data_parallel_shard_degree=-1,
        context_parallel_degree=1,
        tensor_parallel_degree=1,
        expert_parallel_degree=1,
        pipeline_parallel_split=None,  # the configured split is for another number of stages
    )


def _combinations(parallelism: Parallelism, world_size: int) -> Iterator[Parallelism]:
    for pipeline in _divisors(world_size):
        for replicas in _divisors(world_size // pipeline):
            for context in _divisors(world_size // pipeline // replicas):
                for tensor in _divisors(world_size // pipeline // replicas // context):
                    for expert in _divisors(world_size // pipeline // replicas):
                        yield replace(
                            _one_of_each(parallelism),
                            pipeline_parallel_degree=pipeline,
                            data_parallel_replicate_degree=replicas,
                            context_parallel_degree=context,
                            tensor_parallel_degree=tensor,
                            expert_parallel_degree=expert,
                        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
