"""How the kernels of the linear recurrence are launched: tile shapes by architecture, and the arguments of one call."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .recurrence_tiles import Documents, Matrices, Strided, Terms


class Config(NamedTuple):
    """Tile shapes and launch options."""

    chunk: int
    chunks_per_span: int  # how many share one stored state
    block_k: int  # of scores_kernel; scan_kernel holds all of K
    block_v: int
    scores_warps: int
    scan_warps: int
    stages: int


# By architecture, whether a decay is per channel, width of K (64, 128 or 256) and bytes a number: nothing that depends
# on the sequence.
CONFIGS: dict[tuple[str, bool, int, int], Config] = {
    ("default", False, 64, 2): Config(
        chunk=64, chunks_per_span=2, block_k=64, block_v=64, scores_warps=4, scan_warps=4, stages=2
    ),
    ("default", False, 128, 2): Config(
        chunk=64, chunks_per_span=2, block_k=64, block_v=64, scores_warps=4, scan_warps=8, stages=2
    ),
    ("default", False, 256, 2): Config(
        chunk=32, chunks_per_span=4, block_k=64, block_v=16, scores_warps=4, scan_warps=8, stages=1
    ),
    ("default", True, 64, 2): Config(
        chunk=32, chunks_per_span=4, block_k=16, block_v=64, scores_warps=4, scan_warps=8, stages=2
    ),
    ("default", True, 128, 2): Config(
        chunk=32, chunks_per_span=4, block_k=16, block_v=64, scores_warps=4, scan_warps=8, stages=2
    ),
    ("default", True, 256, 2): Config(
        chunk=32, chunks_per_span=4, block_k=16, block_v=16, scores_warps=4, scan_warps=8, stages=1
    ),
    # float32 is multiplied without tensor cores, with operands in registers: smaller tiles.
    ("default", False, 64, 4): Config(
        chunk=16, chunks_per_span=8, block_k=32, block_v=16, scores_warps=8, scan_warps=8, stages=1
    ),
    ("default", False, 128, 4): Config(
        chunk=16, chunks_per_span=8, block_k=32, block_v=16, scores_warps=8, scan_warps=8, stages=1
    ),
    ("default", False, 256, 4): Config(
        chunk=16, chunks_per_span=8, block_k=32, block_v=16, scores_warps=4, scan_warps=8, stages=1
    ),
    ("default", True, 64, 4): Config(
        chunk=16, chunks_per_span=8, block_k=16, block_v=16, scores_warps=8, scan_warps=8, stages=1
    ),
    ("default", True, 128, 4): Config(
        chunk=16, chunks_per_span=8, block_k=16, block_v=16, scores_warps=8, scan_warps=8, stages=1
    ),
    ("default", True, 256, 4): Config(
        chunk=16, chunks_per_span=8, block_k=16, block_v=16, scores_warps=4, scan_warps=8, stages=1
    ),
    # The interpreter's time grows with the number of programs.
    ("interpreter", False, 64, 2): Config(
        chunk=64, chunks_per_span=2, block_k=32, block_v=64, scores_warps=4, scan_warps=4, stages=1
    ),
    ("interpreter", False, 64, 4): Config(
        chunk=64, chunks_per_span=2, block_k=32, block_v=64, scores_warps=4, scan_warps=4, stages=1
    ),
    ("interpreter", True, 64, 2): Config(
        chunk=64, chunks_per_span=2, block_k=32, block_v=64, scores_warps=4, scan_warps=4, stages=1
    ),
    ("interpreter", True, 64, 4): Config(
        chunk=64, chunks_per_span=2, block_k=32, block_v=64, scores_warps=4, scan_warps=4, stages=1
    ),
}
# Its products take their operands from registers.
CONFIGS |= {
    ("sm_80", *key[1:]): config._replace(block_v=min(32, config.block_v))
    for key, config in CONFIGS.items()
    if key[0] == "default"
}
# Triton's pipeliner fails there if a loop stores a state.
CONFIGS |= {("sm_100", *key[1:]): config._replace(stages=1) for key, config in CONFIGS.items() if key[0] == "default"}
# A warp has 64 threads there, with more registers each if they are few.
CONFIGS |= {
    ("gfx942", *key[1:]): config._replace(
        block_v=min(32, config.block_v), scores_warps=config.scores_warps // 2, scan_warps=config.scan_warps // 2
    )
    for key, config in CONFIGS.items()
    if key[0] == "default"
}
FILLS = 128  # programs that keep a chip busy: with as many, one pass suffices and stores no state


def architecture(x: Tensor) -> str:
    """Which machine x is on, as CONFIGS names it."""
    if x.device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(x.device).gcnArchName.split(":")[0]
    major, _ = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}0"


def config_of(configs: dict[tuple[str, bool, int, int], Any], k: Tensor, per_channel: bool, dtype: torch.dtype) -> Any:
    """The entry of `configs` for this machine, or for any."""
    key = (per_channel, max(64, triton.next_power_of_2(k.shape[-1])), dtype.itemsize)
    return configs.get((architecture(k), *key)) or configs["default", key[0], key[1], key[2]]


class Problem(NamedTuple):
    """The arguments of one call as the kernels take them."""

    terms: Terms
    documents: Documents
    heads: int
    shape: dict[str, Any]  # GROUP, K, C, SPAN, PER_CHANNEL, IS_BETA, DOT
    config: Config
    decays_per_channel: bool  # on either side
    scale: float
    dtype: torch.dtype  # in which matrices are multiplied
    num_documents: int
    num_spans: int  # enough for any bounds


def strided(x: Tensor | None) -> Strided | None:
    """x [B, T, heads, width] or [B, T, heads]; copied only if its last dim is not contiguous."""
    if x is None:
        return None
    if x.dim() == 4 and x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return Strided(x, x.stride(0), x.stride(1), x.stride(2))


def packed_documents(cu_seqlens: Tensor, length: int, span: int, num_spans: int) -> Documents:
    """Documents in spans of `span` tokens, of which there are at most num_spans."""
    bounds = cu_seqlens.clamp(0, length)
    counts = torch.div(bounds.diff() + span - 1, span, rounding_mode="floor")
    first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    index = torch.arange(num_spans, dtype=torch.int32, device=bounds.device)
    owner = torch.searchsorted(first[1:].contiguous(), index, right=True, out_int32=True)
    return Documents(length, bounds, first, owner.clamp_(max=max(0, len(counts) - 1)))


def problem_of(
    q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, erase_key: Tensor | None,
    value_log_decay: Tensor | None, bonus: Tensor | None, scale: float, cu_seqlens: Tensor | None,
    chunks_per_span: int | None = None,
) -> Problem:  # fmt: skip
    batch_size, length, heads, _ = v.shape
    dtypes = {x.dtype for x in (q, k, v, erase_key) if x is not None}
    dtype = v.dtype if len(dtypes) == 1 else torch.float32
    decays_per_channel = value_log_decay is not None or (log_decay is not None and log_decay.dim() == 4)
    config = config_of(CONFIGS, k, decays_per_channel, dtype)
    span = config.chunk * (chunks_per_span or config.chunks_per_span)
    documents, num_documents = Documents(length, None, None, None), batch_size
    num_spans = batch_size * triton.cdiv(length, span)
    if cu_seqlens is not None:
        num_documents = len(cu_seqlens) - 1
        num_spans = length // span + num_documents
        documents = packed_documents(cu_seqlens, length, span, num_spans)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(batch_size, length, heads)
    terms = Terms(
        q=strided(q), k=strided(k), v=strided(v), g=strided(log_decay), erase=strided(erase),
        erase_key=strided(erase_key), h=strided(value_log_decay), u=None if bonus is None else bonus.contiguous(),
    )  # fmt: skip
    shape = dict(
        GROUP=heads // k.shape[2], K=k.shape[-1], C=config.chunk, SPAN=span,
        PER_CHANNEL=log_decay is not None and log_decay.dim() == 4, IS_BETA=erase is not None and erase.dim() == 3,
        DOT=getattr(tl, str(dtype).removeprefix("torch.")),
    )  # fmt: skip
    return Problem(
        terms, documents, heads, shape, config, decays_per_channel, scale, dtype, num_documents, num_spans
    )  # fmt: skip


def fill_a_chip(problem: Problem, tiles: int) -> bool:
    """Whether programs for documents, heads and `tiles` of columns do; spans make no more if each is a document."""
    return problem.num_documents * problem.heads * tiles >= FILLS or problem.num_spans <= problem.num_documents


def empty_matrices(problem: Problem) -> Matrices:
    """Room for <q, k> of every chunk, T with an erase term, <q, erase_key> and <erase, k> if erase_key is not k."""
    terms, chunk = problem.terms, problem.config.chunk
    per_chunk = 1 if terms.erase is None else 2 if terms.erase_key is None else 4
    size = (problem.num_spans * problem.shape["SPAN"] // chunk, problem.heads, per_chunk, chunk, chunk)
    return Matrices(torch.empty(size, dtype=problem.dtype, device=terms.v.pointer.device), per_chunk)


def empty_states(problem: Problem) -> Tensor:
    """Room for the state at the start of every span, in the dtype of products."""
    v = problem.terms.v.pointer
    size = (problem.num_spans, problem.heads, problem.shape["K"], v.shape[-1])
    return torch.empty(size, dtype=problem.dtype, device=v.device)
