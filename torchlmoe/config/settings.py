"""Every setting: a dataclass per TOML table, a field per key, with its range, unit and meaning.

`load.py` fills them from a flavor, a TOML file and the command line, in this order, and rejects values that do
not fit. A setting that is listed here but not supported yet raises an error when it is given; it is never ignored.
"""

from dataclasses import asdict, dataclass, field, make_dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import torch
from pydantic import AfterValidator, ConfigDict, Field

from torchlmoe.feed_forwards import FEED_FORWARDS, NONE
from torchlmoe.files import expanded
from torchlmoe.layers.losses import LOSSES
from torchlmoe.layers.rope_scaling import RopeScalingTable
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.attention import ZeroCenteredNorm
from torchlmoe.model.spec import BlockSpec, ModelSpec, Residual
from torchlmoe.ops import host_dtype
from torchlmoe.ops.linear_recurrence import Backend
from torchlmoe.options import Configurable, InitStd, NormEps

# Options that a mixer, or a feed-forward layer, takes from [model] unless its letter sets them.
MODEL_WIDE = ("num_heads", "norm_eps", "zero_centered_norm", "init_std", "backend", "rope_base", "rope_scaling")
FEED_FORWARD_WIDE = ("mlp_dim", "norm_eps", "init_std")
# Validator of a setting that is, or may be, a local path.
PATH = AfterValidator(lambda path: None if path is None else expanded(path))


@dataclass
class Table:
    """Base of all tables: unknown keys are errors, and no value is converted (a string is not a number)."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass
class Job(Table):
    config_file: Annotated[str | None, Field(description="TOML file with settings."), PATH] = None
    dump_folder: Annotated[str, Field(description="Folder for a run's files."), PATH] = "outputs"
    custom_modules: Annotated[
        list[str], Field(description="Python modules to import; they may register mixers, losses and readers.")
    ] = field(default_factory=list)
    print_config: Annotated[bool, Field(description="Print the resolved settings as TOML and stop.")] = False
    debug: Annotated[bool, Field(description="Show the whole traceback of an error.")] = False


@dataclass
class Model(Table):
    name: Annotated[Literal["linear_moe"], Field(description="Architecture family.")] = "linear_moe"
    flavor: Annotated[
        Literal["debug", "a0.3b_2b", "a1b_7b"],
        Field(description="Named set of sizes; TOML file and command line override it."),
    ] = "debug"
    layer_pattern: Annotated[
        str, Field(pattern="^[A-Za-z]+$", description="One letter per block, repeated up to num_layers.")
    ] = "LLLN"
    mixer: Annotated[str | None, Field(description="Shorthand for model.layers.L.mixer.")] = None
    backend: Annotated[Backend, Field(description="Implementation of recurrences; auto: Triton on a GPU.")] = "auto"
    vocab_size: Annotated[
        int | None, Field(ge=2, le=2**24, description="Rows of the embedding; the tokenizer's size if unset.")
    ] = None
    dim: Annotated[int, Field(ge=1, le=1_000_000, description="Width of the residual stream.")] = 256
    num_layers: Annotated[int, Field(ge=1, le=10_000, description="Number of blocks.")] = 4
    num_heads: Annotated[int, Field(ge=1, description="Heads of a mixer, unless its letter sets them.")] = 4
    mlp_dim: Annotated[
        int | None, Field(ge=1, description="Hidden width of dense MLPs; set by activation if unset.")
    ] = None
    rope_base: Annotated[float, Field(gt=1, le=1e12, description="Base of the rotary wavelengths.")] = 10_000.0
    rope_scaling: RopeScalingTable = None
    norm: Annotated[
        Literal["rms", "layer"],
        Field(description="Norm of embedding, blocks and head: RMS or layer norm (RWKV). Mixers keep theirs."),
    ] = "rms"
    norm_bias: Annotated[bool, Field(description="Whether these layer norms have a bias.")] = True
    norm_eps: NormEps = 1e-6
    zero_centered_norm: ZeroCenteredNorm = False
    init_std: InitStd = 0.02
    tie_embeddings: Annotated[bool, Field(description="Share the embedding with the output head.")] = False
    embedding_norm: Annotated[
        bool, Field(description="Norm of the embeddings, before the first block (RWKV, BLOOM).")
    ] = False
    embedding_multiplier: Annotated[
        float, Field(ge=1e-6, le=1e6, description="Multiplies the embeddings (Granite).")
    ] = 1.0
    logit_divisor: Annotated[
        float, Field(ge=1e-6, le=1e6, description="Divides the logits (Granite's logits_scaling).")
    ] = 1.0
    loss_chunk_size: Annotated[int, Field(ge=1, description="Tokens whose logits are in memory at once.")] = 512
    layers: Annotated[
        dict[str, dict[str, Any]],
        Field(
            description="Per letter: mixer (a name or none), mlp (moe | dense | none), how they join the residual "
            "stream, the mixer's settings, and mlp_options, the settings of the feed-forward layer."
        ),
    ] = field(default_factory=dict)


# [moe] holds the layer's keyword arguments, except those that [model] gives to all layers.
if TYPE_CHECKING:
    MoE = Any
else:
    MoE = make_dataclass(
        "MoE",
        [(name, *setting) for name, setting in FEED_FORWARDS["moe"].settings().items() if name != "init_std"],
        bases=(Table,),
    )


@dataclass
class MixtureSource(Table):
    """One source of data.mixture. A key that is not given has the value of [data], except reader_options."""

    dataset: Annotated[str, Field(description="The same as data.dataset."), PATH]
    weight: Annotated[float, Field(ge=0, le=1e12, description="Share of the rows, relative to the other sources.")] = (
        1.0
    )
    name: Annotated[str | None, Field(min_length=1, description="Name in metrics.jsonl; dataset's if unset.")] = None
    dataset_config: Annotated[str | None, Field(description="The same as data.dataset_config.")] = None
    dataset_revision: Annotated[str | None, Field(description="The same as data.dataset_revision.")] = None
    text_column: Annotated[str | None, Field(description="The same as data.text_column.")] = None
    train_split: Annotated[str | None, Field(description="The same as data.train_split.")] = None
    reader_options: Annotated[dict[str, Any], Field(description="The same as data.reader_options.")] = field(
        default_factory=dict
    )
    max_tokens: Annotated[int | None, Field(ge=2, description="The same as data.max_tokens.")] = None

    @property
    def label(self) -> str:
        return self.name or self.dataset.rstrip("/").rpartition("/")[2]


@dataclass
class Data(Table):
    dataset: Annotated[
        str,
        Field(
            description="embedded, a local file or folder (json, parquet, text, or tokens in .bin or .npy), a reader, "
            "a recall task (recall:mqar), or a hub id (streamed)."
        ),
        PATH,
    ] = "embedded"
    reader_options: Annotated[dict[str, Any], Field(description="Settings of the reader or recall task.")] = field(
        default_factory=dict
    )
    dataset_config: Annotated[str | None, Field(description="Configuration of a hub dataset.")] = None
    dataset_revision: Annotated[
        str | None, Field(min_length=1, description="Commit, branch or tag of a hub dataset; the newest if unset.")
    ] = None
    mixture: Annotated[
        list[MixtureSource],
        Field(
            description="Train on several datasets in place of `dataset`: tables with dataset, weight (share of the "
            "rows), name (in metrics.jsonl), reader_options, and dataset_config, dataset_revision, text_column, "
            "train_split, max_tokens if they differ from those of [data]."
        ),
    ] = field(default_factory=list)
    tokenizer: Annotated[str, Field(description="embedded, or a tokenizer.json or its folder."), PATH] = "embedded"
    end_token: Annotated[str | None, Field(description="Token between documents; found by name if unset.")] = None
    text_column: Annotated[str, Field(description="Column that holds the text.")] = "text"
    train_split: Annotated[str, Field(description="Split to train on.")] = "train"
    validation_split: Annotated[str, Field(description="Split to validate on.")] = "validation"
    validation_dataset: Annotated[
        str | None, Field(description="Dataset to validate on; `dataset` if unset."), PATH
    ] = None
    validation_fraction: Annotated[
        float, Field(ge=1e-6, lt=1, description="Share of documents held out if there is no validation split.")
    ] = 0.01
    max_tokens: Annotated[int | None, Field(ge=2, description="Stop tokenizing after this many tokens.")] = None
    validation_max_tokens: Annotated[int | None, Field(ge=2, description="The same for the validation split.")] = None
    cache_dir: Annotated[
        str | None, Field(description="Folder for tokenized text; ~/.cache/torchlmoe if unset."), PATH
    ] = None
    num_prefetch: Annotated[int, Field(ge=1, le=1000, description="Steps whose batches are read ahead.")] = 2
    token_dtype: Annotated[
        Literal["uint16", "uint32"] | None,
        Field(description="Dtype of token files that do not record it; chosen by vocabulary size if unset."),
    ] = None
    num_workers: Annotated[
        int | None, Field(ge=1, le=4096, description="Processes per host that tokenize; one per core if unset.")
    ] = None
    num_writers: Annotated[
        int, Field(ge=1, le=100_000, description="Hosts that share cache_dir and tokenize together.")
    ] = 1
    writer: Annotated[
        int | None,
        Field(ge=0, description="Index of this host, from 0; unset: GROUP_RANK of torchrun, SLURM_NODEID, or 0."),
    ] = None
    writer_timeout_seconds: Annotated[
        float,
        Field(ge=1, le=2_592_000, description="A host that gives no sign of life for this long is taken for lost."),
    ] = 600.0


@dataclass
class Training(Table):
    steps: Annotated[int, Field(ge=1, description="Optimizer steps.")] = 100
    seq_len: Annotated[int, Field(ge=1, le=2**30, description="Tokens in a row.")] = 512
    local_batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=1_000_000,
            description="Rows per microbatch of a data rank; its share of the global batch, or 8, if unset.",
        ),
    ] = None
    global_batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=1_000_000_000,
            description="Rows per optimizer step, over all ranks; local_batch_size per data rank if unset.",
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, description="Seed of initialization and data order.")] = 0
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64", "auto"],
        Field(
            description="bfloat16 keeps float32 master weights; float64 is for parity tests; auto is bfloat16 if the "
            "device has instructions for it, else float32."
        ),
    ] = "float32"
    loss: Annotated[str, Field(description="Loss to train with; validation always uses cross_entropy.")] = (
        "cross_entropy"
    )
    loss_options: Annotated[dict[str, Any], Field(description="Settings of the loss.")] = field(default_factory=dict)
    max_norm: Annotated[
        float, Field(ge=0, le=1e9, description="Gradient norms above this are clipped to it; 0 for no clipping.")
    ] = 1.0
    non_finite: Annotated[
        Literal["stop", "skip"],
        Field(description="If a loss or gradient is not finite: stop the run, or skip the step."),
    ] = "stop"
    deterministic: Annotated[bool, Field(description="Use deterministic algorithms only.")] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="Device to run on.")] = "auto"

    def dtype_on(self, device_type: str) -> torch.dtype:
        """Return the dtype that a model computes in on a device ("cpu" or "cuda")."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        is_gpu = device_type != "cpu" or host_dtype.stands_for_gpu
        return torch.bfloat16 if is_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@dataclass
class Optimizer(Table):
    name: Annotated[str, Field(description="Update rule: adamw, or muon for the matrices of the blocks.")] = "adamw"
    options: Annotated[dict[str, Any], Field(description="Settings of a custom optimizer.")] = field(
        default_factory=dict
    )
    lr: Annotated[float, Field(ge=1e-9, le=100, description="Peak learning rate.")] = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1, description="Decay of the gradient's mean.")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="Decay of the squared gradient's mean.")] = 0.95
    eps: Annotated[float, Field(ge=1e-20, le=1, description="Added to the update's denominator.")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=100, description="Weight decay of matrices; vectors have none.")] = (
        0.1
    )
    matrix_lr: Annotated[
        float | None, Field(ge=1e-9, le=100, description="Muon's peak learning rate; lr if unset.")
    ] = None
    momentum: Annotated[float, Field(ge=0, lt=1, description="Decay of the gradient's mean in Muon.")] = 0.95


@dataclass
class LRScheduler(Table):
    warmup_steps: Annotated[int, Field(ge=0, description="Steps of linear warmup.")] = 0
    decay: Annotated[
        Literal["cosine", "linear", "wsd"], Field(description="wsd: stable, then linear over the last part.")
    ] = "cosine"
    min_lr_factor: Annotated[float, Field(ge=0, le=1, description="Last learning rate, divided by the peak.")] = 0.1
    decay_fraction: Annotated[float, Field(ge=1e-6, le=1, description="wsd: share of steps that decay.")] = 0.2


@dataclass
class Checkpoint(Table):
    enable: Annotated[bool, Field(description="Save checkpoints, and resume from the latest.")] = False
    interval: Annotated[int, Field(ge=1, description="Steps between checkpoints; the last step always saves one.")] = (
        500
    )
    keep_latest_k: Annotated[int, Field(ge=1, description="Checkpoints to keep; older ones are removed.")] = 2
    async_mode: Annotated[
        Literal["disabled", "async"], Field(description="async: a background thread writes while training continues.")
    ] = "disabled"
    load_step: Annotated[
        int | None, Field(ge=0, description="Resume from the checkpoint of this step, once; the latest if unset.")
    ] = None


@dataclass
class Validation(Table):
    enable: Annotated[bool, Field(description="Validate at intervals and at the end.")] = True
    interval: Annotated[int, Field(ge=1, description="Steps between validations.")] = 1000
    max_batches: Annotated[
        int | None, Field(ge=1, description="Batches per validation, over all ranks; all if unset. The last uses all.")
    ] = None
    local_batch_size: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="Rows per batch of a data rank; training's, or 8, if unset.")
    ] = None


@dataclass
class Metrics(Table):
    log_freq: Annotated[int, Field(ge=1, description="Log every N-th step.")] = 10
    tensorboard: Annotated[bool, Field(description="Write TensorBoard files.")] = True
    plot: Annotated[bool, Field(description="Draw loss_curve.png.")] = True
    peak_tflops: Annotated[
        float | None,
        Field(ge=1e-6, le=1e9, description="Peak of a device for MFU, in TFLOP/s; looked up or measured if unset."),
    ] = None


@dataclass
class Profiling(Table):
    enable: Annotated[bool, Field(description="Write Chrome traces of some steps to <dump_folder>/profile.")] = False
    first_step: Annotated[int, Field(ge=2, description="First traced step.")] = 10
    num_steps: Annotated[int, Field(ge=1, description="Steps in a trace.")] = 3
    interval: Annotated[int, Field(ge=2, description="Steps from the start of one trace to the next.")] = 1000
    memory_snapshot: Annotated[bool, Field(description="Also write the CUDA allocator's history with each trace.")] = (
        False
    )


@dataclass
class Float8(Table):
    enable: Annotated[bool, Field(description="Compute the blocks' linear layers in float8 (torchao).")] = False
    recipe: Annotated[Literal["tensorwise", "rowwise"], Field(description="One scale per tensor, or one per row.")] = (
        "tensorwise"
    )
    experts: Annotated[
        Literal["none", "mxfp8"],
        Field(
            description="Compute the routed experts in MXFP8 (torchao's prototype), on GPUs that support it; a CPU "
            "emulates it. Independent of `enable`."
        ),
    ] = "none"


@dataclass
class Compile(Table):
    enable: Annotated[bool, Field(description="Compile each block with torch.compile.")] = False


@dataclass
class ActivationCheckpoint(Table):
    mode: Annotated[
        Literal["none", "selective", "full"],
        Field(description="What the backward pass recomputes: nothing, all but products and recurrences, or all."),
    ] = "none"


@dataclass
class Parallelism(Table):
    data_parallel_replicate_degree: Annotated[int, Field(ge=1, description="Replicas (HSDP).")] = 1
    data_parallel_shard_degree: Annotated[
        int,
        Field(ge=-1, description="Ranks that shard the parameters and have different rows (FSDP2); -1: all others."),
    ] = -1
    tensor_parallel_degree: Annotated[
        int, Field(ge=1, description="Ranks that split the heads of mixers and the hidden channels of MLPs.")
    ] = 1
    pipeline_parallel_degree: Annotated[int, Field(ge=1, description="Ranks that split the blocks into stages.")] = 1
    pipeline_parallel_schedule: Annotated[
        Literal["1F1B", "Interleaved1F1B"],
        Field(description="One stage per rank, or several: less idle time, more communication."),
    ] = "1F1B"
    pipeline_parallel_split: Annotated[
        list[int] | None,
        Field(description="First block of each stage after the first; unset: stages of about equal FLOPs."),
    ] = None
    expert_parallel_degree: Annotated[
        int, Field(ge=1, description="Ranks with different tokens that split the experts.")
    ] = 1
    context_parallel_degree: Annotated[
        int, Field(ge=1, description="Ranks that split a microbatch's tokens into contiguous spans.")
    ] = 1
    lsm_context_parallel: Annotated[
        Literal["all_gather", "ring"],
        Field(description="How states reach later spans: one all-gather (LASP-2), or from neighbor to neighbor."),
    ] = "all_gather"
    attention_context_parallel: Annotated[
        Literal["all_gather", "ulysses"],
        Field(description="Softmax blocks: gather all keys and values, or trade tokens for heads by all-to-all."),
    ] = "all_gather"
    timeout_seconds: Annotated[
        float,
        Field(
            ge=0.1,
            le=2_592_000,
            description="A collective that takes longer has failed: a rank hangs or is far behind.",
        ),
    ] = 300.0


@dataclass
class Config(Table):
    """Linear-MoE training. The command line overrides the TOML file, which overrides the flavor."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    moe: MoE = field(default_factory=MoE)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    float8: Float8 = field(default_factory=Float8)
    compile: Compile = field(default_factory=Compile)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    parallelism: Parallelism = field(default_factory=Parallelism)

    def block_spec(self, letter: str) -> BlockSpec:
        """Describe the blocks of a letter, with every option of their layers' constructors."""
        table = dict(self.model.layers[letter])
        named, mlp, own = table.pop("mixer"), table.pop("mlp", "moe"), table.pop("mlp_options", {})
        residual = Residual(**{name: table.pop(name) for name in Residual.settings() if name in table})
        mixer = feed_forward = None
        mixer_options: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if named != NONE:
            mixer = MIXERS[named]
            mixer_options = _defaults(mixer) | self._model_wide(mixer, MODEL_WIDE) | table
        if mlp != NONE:
            feed_forward = FEED_FORWARDS[mlp]
            of_table = asdict(self.moe) if mlp == "moe" else {}
            options = _defaults(feed_forward) | self._model_wide(feed_forward, FEED_FORWARD_WIDE) | of_table | own
        return BlockSpec(letter, mixer, mixer_options, feed_forward, options, residual)

    def spec(self, vocab_size: int) -> ModelSpec:
        """Return the model that these settings describe."""
        model, pattern = self.model, self.model.layer_pattern
        letters = [pattern[index % len(pattern)] for index in range(model.num_layers)]
        of_letter = {letter: self.block_spec(letter) for letter in letters}
        return ModelSpec(
            vocab_size=vocab_size,
            dim=model.dim,
            blocks=tuple(of_letter[letter] for letter in letters),
            norm_kind=model.norm,
            norm_bias=model.norm_bias,
            norm_eps=model.norm_eps,
            zero_centered_norm=model.zero_centered_norm,
            init_std=model.init_std,
            tie_embeddings=model.tie_embeddings,
            embedding_norm=model.embedding_norm,
            embedding_multiplier=model.embedding_multiplier,
            logit_divisor=model.logit_divisor,
            loss_chunk_size=model.loss_chunk_size,
            loss=partial(LOSSES[self.training.loss], **self.training.loss_options),
        )

    def _model_wide(self, layer: type[Configurable], names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self.model, name) for name in names if name in layer.settings()}


def setting(config: Config, name: str) -> Any:
    """Return the value of a setting. name: `table.key`."""
    table, _, key = name.partition(".")
    return getattr(getattr(config, table), key)


def fields(table: type) -> dict[str, Any]:
    """Return the annotated types of a table's settings by name, or of `Config`'s tables."""
    return get_type_hints(table, include_extras=True)


def _defaults(layer: type[Configurable]) -> dict[str, Any]:
    return {name: default for name, (_, default) in layer.settings().items() if default is not ...}
