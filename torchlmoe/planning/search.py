"""All layouts of a number of ranks that a model and its batch allow, and their plans from the fastest on."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torchlmoe.config.batch import check_degrees
from torchlmoe.config.settings import Config, Parallelism
from torchlmoe.parallel.parallelize import whole_model
from torchlmoe.planning.gpus import GPU
from torchlmoe.planning.layout import Plan, make_plan


def legal_layouts(config: Config, vocab_size: int, world_size: int) -> Iterator[Config]:
    """The settings with each combination of degrees that `check_degrees` and `whole_model` let pass.

    What else the settings say (schedule, ways of context parallelism, batch) stays.
    """
    for degrees in _combinations(config.parallelism, world_size):
        layout = replace(config, parallelism=degrees)
        try:
            check_degrees(layout, world_size)
            whole_model(layout, vocab_size, world_size)
        except ValueError:
            continue
        yield layout


def search(
    config: Config,
    vocab_size: int,
    world_size: int,
    gpu: GPU,
    gpu_name: str,
    ranks_per_node: int,
    tell: Callable[[Plan], None],
) -> list[Plan]:
    """Plans of all legal layouts: those that fit by predicted time, then those that do not, by how much they need.

    tell: is called with each plan as it is made. Raises ValueError where no layout is legal.
    """
    plans = []
    for layout in legal_layouts(config, vocab_size, world_size):
        plans.append(make_plan(layout, vocab_size, world_size, gpu, gpu_name, ranks_per_node))
        tell(plans[-1])
    if not plans:
        raise ValueError(
            f"--world-size {world_size} has no layout that the model and training.global_batch_size = "
            f"{config.training.global_batch_size} allow; choose another number of ranks or another batch."
        )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds_per_step if plan.fits else plan.peak_bytes))


def _combinations(given: Parallelism, world_size: int) -> Iterator[Parallelism]:
    for pipeline in _divisors(world_size):
        for replicas in _divisors(world_size // pipeline):
            for context in _divisors(world_size // pipeline // replicas):
                for tensor in _divisors(world_size // pipeline // replicas // context):
                    for expert in _divisors(world_size // pipeline // replicas):
                        yield replace(
                            given,
                            pipeline_parallel_degree=pipeline,
                            data_parallel_replicate_degree=replicas,
                            data_parallel_shard_degree=-1,
                            context_parallel_degree=context,
                            tensor_parallel_degree=tensor,
                            expert_parallel_degree=expert,
                            # One that was given is for another number of stages.
                            pipeline_parallel_split=None,
                        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
