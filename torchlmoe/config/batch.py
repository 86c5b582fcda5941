"""Checks that the degrees of parallelism fit the ranks and the batch, and computes rows and tokens per rank."""

from math import prod

from torchlmoe.config.errors import ConfigError
from torchlmoe.config.settings import Config, Training


def check_degrees(config: Config, world_size: int) -> None:
    """Check that the degrees fit the number of ranks, and that the batch fits the degrees."""
    degrees = config.parallelism
    replicate, shard = degrees.data_parallel_replicate_degree, degrees.data_parallel_shard_degree
    context = degrees.context_parallel_degree
    if shard == 0:
        raise ConfigError("parallelism.data_parallel_shard_degree = 0 is impossible; give -1 (the rest) or at least 1.")
    others = {
        "pipeline_parallel_degree": degrees.pipeline_parallel_degree,
        "data_parallel_replicate_degree": replicate,
        "context_parallel_degree": context,
        "tensor_parallel_degree": degrees.tensor_parallel_degree,
    }
    product = prod(others.values())
    if shard == -1:
        if world_size % product:
            given = " times ".join(f"{name} = {degree}" for name, degree in others.items() if degree > 1)
            raise ConfigError(f"parallelism.{given} does not divide the {world_size} ranks; choose a divisor.")
    elif product * shard != world_size:
        given = " times ".join(f"{name} = {degree}" for name, degree in others.items() if degree > 1)
        raise ConfigError(
            f"parallelism.data_parallel_shard_degree = {shard}{' times ' * bool(given)}{given} is {product * shard}, "
            f"but there are {world_size} ranks; their product must be the number of ranks."
        )
    expert, lenders = degrees.expert_parallel_degree, world_size // (replicate * degrees.pipeline_parallel_degree)
    if lenders % expert:
        raise ConfigError(
            f"parallelism.expert_parallel_degree = {expert} does not divide the {lenders} ranks of "
            "data_parallel_shard_degree times context_parallel_degree times tensor_parallel_degree; choose a divisor."
        )
    seq_len, rows = config.training.seq_len, batch_rows(config, world_size)
    pieces = context * degrees.tensor_parallel_degree
    for table, num_rows in rows.items():
        for name, parts in (("context_parallel_degree", context), ("tensor_parallel_degree", pieces)):
            if num_rows * seq_len % parts:
                each = f" times context_parallel_degree = {context}" * (parts != context)
                raise ConfigError(
                    f"parallelism.{name} = {getattr(degrees, name)}{each} does not divide the {num_rows} x {seq_len} "
                    f"tokens of {table}.local_batch_size rows of training.seq_len; choose a divisor."
                )
    tokens = rows["training"] * seq_len
    # Other linear layers in float8 have the tokens of all ranks of tensor parallelism.
    parts = pieces if _has_latent_experts(config) else context
    if config.float8.enable and tokens // parts % 16:
        of_latent = f" times tensor_parallel_degree = {degrees.tensor_parallel_degree}, for latent_dim" * (
            parts > context
        )
        raise ConfigError(
            "float8.enable = true needs a multiple of 16 tokens at once; training.local_batch_size * seq_len is "
            f"{tokens}, over context_parallel_degree = {context}{of_latent}."
        )
    if degrees.pipeline_parallel_degree > 1:
        _check_microbatches(config, world_size)


def _has_latent_experts(config: Config) -> bool:
    """Whether projections before and after experts run on each rank's piece of the tokens."""
    tables = [config.model.layers[letter] for letter in config.model.layer_pattern[: config.model.num_layers]]
    of_moe = [table.get("mlp_options", {}) for table in tables if table.get("mlp", "moe") == "moe"]
    return any(options.get("latent_dim", config.moe.latent_dim) is not None for options in of_moe)


def ranks_of_rows(config: Config) -> int:
    """Return the number of ranks that work on the same rows."""
    degrees = config.parallelism
    return degrees.pipeline_parallel_degree * degrees.context_parallel_degree * degrees.tensor_parallel_degree


def num_stages(config: Config) -> int:
    """Return the number of pipeline stages. Raises ConfigError for a split that does not fit the schedule."""
    degrees = config.parallelism
    ranks, schedule, split = (
        degrees.pipeline_parallel_degree,
        degrees.pipeline_parallel_schedule,
        degrees.pipeline_parallel_split,
    )
    is_interleaved = schedule == "Interleaved1F1B"
    if split is None:
        return ranks * (2 if is_interleaved else 1)
    split = split[split[:1] == [0] :]  # stage 0 always starts at block 0
    stages = len(split) + 1
    if is_interleaved and (stages % ranks or stages == ranks):
        raise ConfigError(
            f"parallelism.pipeline_parallel_split = {split} makes {stages} stages, and {schedule} takes 2 or more for "
            f"each of the {ranks} ranks of pipeline_parallel_degree; give {2 * ranks - 1} first blocks, or "
            f"{3 * ranks - 1}."
        )
    if not is_interleaved and stages != ranks:
        raise ConfigError(
            f"parallelism.pipeline_parallel_split = {split} makes {stages} stages, and {schedule} takes one for each "
            f"of the {ranks} ranks of pipeline_parallel_degree; give {ranks - 1} first blocks."
        )
    return stages


def _check_microbatches(config: Config, world_size: int) -> None:
    """Check that a step has as many microbatches as the pipeline schedule needs."""
    data_ranks, ranks = world_size // ranks_of_rows(config), config.parallelism.pipeline_parallel_degree
    local, whole = batch_sizes(config.training, data_ranks)
    microbatches, stages = whole // (local * data_ranks), num_stages(config)
    if microbatches < stages:
        of_rank = whole // data_ranks
        fewer = next((rows for rows in range(of_rank // stages, 0, -1) if of_rank % rows == 0), None)
        remedy = "" if fewer is None else f"local_batch_size = {fewer} or "
        raise ConfigError(
            f"training.global_batch_size = {whole} with training.local_batch_size = {local} on {data_ranks} data ranks "
            f"gives {microbatches} of the {stages} microbatches that a pipeline of {stages} stages needs; set {remedy}"
            f"global_batch_size = {stages * local * data_ranks}."
        )
    rounds = microbatches // ranks
    if config.parallelism.pipeline_parallel_schedule == "Interleaved1F1B" and microbatches % rounds:
        fitting = microbatches // ranks * ranks
        raise ConfigError(
            f"training.global_batch_size = {whole} with training.local_batch_size = {local} on {data_ranks} data ranks "
            f"gives {microbatches} microbatches, which Interleaved1F1B cannot run in {rounds} equal rounds; set "
            f"global_batch_size = {fitting * local * data_ranks}."
        )


def batch_sizes(training: Training, data_ranks: int) -> tuple[int, int]:
    """Return the rows of a microbatch and the rows of a step over all ranks. Raises ConfigError if they do not fit."""
    local, whole = training.local_batch_size, training.global_batch_size
    if whole is None:
        local = local or 8
        return local, local * data_ranks
    if local is None:
        if whole % data_ranks:
            raise ConfigError(
                f"training.global_batch_size = {whole} must be a multiple of the {data_ranks} data ranks; change one."
            )
        return whole // data_ranks, whole
    if whole % (local * data_ranks):
        raise ConfigError(
            f"training.global_batch_size = {whole} must be a multiple of local_batch_size times the data ranks, "
            f"{local} x {data_ranks} = {local * data_ranks}."
        )
    return local, whole


def validation_batch_size(config: Config) -> int:
    """Return the rows of a validation batch. It does not depend on the number of ranks, unlike that of training."""
    return config.validation.local_batch_size or config.training.local_batch_size or 8


def batch_rows(config: Config, world_size: int) -> dict[str, int]:
    """Return the rows of a microbatch in training and, if enabled, in validation. Errors: see `batch_sizes`."""
    rows, _ = batch_sizes(config.training, world_size // ranks_of_rows(config))
    return {"training": rows} | ({"validation": validation_batch_size(config)} if config.validation.enable else {})


def shortest_span(config: Config, world_size: int) -> int:
    """Return the smallest number of tokens that a rank has of a microbatch, in training or in validation."""
    rows = min(batch_rows(config, world_size).values())
    return rows * config.training.seq_len // config.parallelism.context_parallel_degree
