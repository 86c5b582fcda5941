"""Whether the degrees of parallelism fit the ranks and the batch, and how many rows and tokens each rank has."""

from torchlmoe.config.load import ConfigError
from torchlmoe.config.settings import Config, Training


def check_degrees(config: Config, world_size: int) -> None:
    """Whether the degrees fit the number of ranks, and the batch fits them."""
    degrees = config.parallelism
    replicate, shard = degrees.data_parallel_replicate_degree, degrees.data_parallel_shard_degree
    context = degrees.context_parallel_degree
    if shard == 0:
        raise ConfigError("parallelism.data_parallel_shard_degree = 0 is impossible; give -1 (the rest) or at least 1.")
    if shard == -1:
        if world_size % (replicate * context):
            raise ConfigError(
                f"parallelism.data_parallel_replicate_degree = {replicate} times context_parallel_degree = {context} "
                f"does not divide the {world_size} ranks; choose a divisor."
            )
    elif replicate * shard * context != world_size:
        raise ConfigError(
            f"parallelism.data_parallel_replicate_degree = {replicate} times data_parallel_shard_degree = {shard} "
            f"times context_parallel_degree = {context} is {replicate * shard * context}, but there are {world_size} "
            "ranks; their product must be the number of ranks."
        )
    seq_len, rows = config.training.seq_len, batch_rows(config, world_size)
    for table, num_rows in rows.items():
        if num_rows * seq_len % context:
            raise ConfigError(
                f"parallelism.context_parallel_degree = {context} does not divide the {num_rows} x {seq_len} tokens of "
                f"{table}.local_batch_size rows of training.seq_len; choose a divisor."
            )
    tokens = rows["training"] * seq_len
    if config.float8.enable and tokens // context % 16:
        raise ConfigError(
            "float8.enable = true needs a multiple of 16 tokens at once; training.local_batch_size * seq_len is "
            f"{tokens}, over context_parallel_degree = {context}."
        )


def batch_sizes(training: Training, data_ranks: int) -> tuple[int, int]:
    """Rows that a rank holds at once, and rows of an optimizer step over all ranks. ConfigError if they do not fit."""
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
    """Rows of a validation batch: not what a rank trains on, since how a part is cut must not hang on the ranks."""
    return config.validation.local_batch_size or config.training.local_batch_size or 8


def batch_rows(config: Config, world_size: int) -> dict[str, int]:
    """Rows at once, in training and, if enabled, in validation. ConfigError as of `batch_sizes`."""
    rows, _ = batch_sizes(config.training, world_size // config.parallelism.context_parallel_degree)
    return {"training": rows} | ({"validation": validation_batch_size(config)} if config.validation.enable else {})


def shortest_span(config: Config, world_size: int) -> int:
    """Tokens that a rank holds at once, in training or in validation, whichever is less."""
    rows = min(batch_rows(config, world_size).values())
    return rows * config.training.seq_len // config.parallelism.context_parallel_degree
