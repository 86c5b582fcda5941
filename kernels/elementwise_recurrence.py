"""The recurrence with elementwise decay: forward, and one token at a time.

    S_t = exp(G_t) * S_{t-1} + k_t v_t^T          o_t = Re(S_t^T q_t)          * elementwise, S and G in R or C^{K x V}

Used by Mamba (G_t = step_t[v] * G[k, v]), S4 (G, q and k constant over tokens, complex), HGRN and fast weights with
a full gate (a separate G for every token). Real numbers are complex ones whose imaginary part the compiler drops.

Documents are cut into chunks. A chunk maps the state S to P S + X, so there are three launches:

    tokens      |  chunk 0   |  chunk 1   |  chunk 2   |
    1 summary      P_0, X_0     P_1, X_1     P_2, X_2
    2 fold       S_0 --------> S_1 --------> S_2 ------> final state
    3 read            o            o            o

    A program of 1 and 3 has a chunk, a head and a tile of columns, and takes the K keys one after another:

                  columns: values of a head, or of all heads where q and k do not vary
               +-----------+
      tokens   |  BLOCK_T  |     a = exp(G) and x = k v^T in registers; S by an associative scan of S -> a S + x down
               | x BLOCK_C |     the tile, so that no state of a token is ever stored
               +-----------+

    One token a row (decoding) is one launch, whose program has a row, a head and a tile of columns, and takes BLOCK_K
    keys at a time:

                  columns
               +-----------+
      keys     |  BLOCK_K  |     S = exp(G) S + k v^T, from the initial state to the final one, and o the sum over keys
               | x BLOCK_C |
               +-----------+

Only the first state of each chunk ([chunks, H, K, V]) is kept for the gradient, which is in
`elementwise_recurrence_backward.py`. With one token per row it is the initial state, and nothing is kept. No exponent
is positive, and decays are neither divided nor subtracted.

Inner dims must have stride one and rows of a batch equal strides; other layouts are copied first, except a
decay that is constant over tokens.

Legend: M = B * T tokens, H heads, K key width, V value width, N documents.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .elementwise_tiles import (
    Columns,
    Complex,
    Rows,
    Strided,
    StridedDecay,
    Terms,
    chunk_rows,
    conjugate,
    exp,
    key_tile,
    load,
    log_decay_tile,
    place,
    plus,
    scaled,
    scan,
    store,
    sum_along,
    tile_columns,
    times,
    value_tile,
)


class Config(NamedTuple):
    """The tile of a program and its warps."""

    rows: int  # tokens of a chunk or, at most, keys of one token
    columns: int
    warps: int


# By architecture and kind of a tile's rows. What is constant over tokens is read for every chunk, as states are, so
# that long chunks move less; 16 columns still fill a sector of memory. Fewer keys come with more columns, so that a
# program with enough columns reads and writes 8 KiB of a real state.
CONFIGS = {
    ("sm_80", "constant"): Config(rows=128, columns=16, warps=8),  # tokens, with q and k constant over them
    ("sm_90", "constant"): Config(rows=128, columns=16, warps=8),
    ("sm_100", "constant"): Config(rows=128, columns=16, warps=8),
    ("gfx942", "constant"): Config(rows=128, columns=16, warps=4),
    ("interpreter", "constant"): Config(rows=16, columns=16, warps=1),
    ("sm_80", "token"): Config(rows=64, columns=32, warps=8),
    ("sm_90", "token"): Config(rows=64, columns=32, warps=8),
    ("sm_100", "token"): Config(rows=64, columns=32, warps=8),
    ("gfx942", "token"): Config(rows=64, columns=32, warps=4),
    ("interpreter", "token"): Config(rows=16, columns=16, warps=1),
    ("sm_80", "key"): Config(rows=64, columns=32, warps=8),
    ("sm_90", "key"): Config(rows=64, columns=32, warps=8),
    ("sm_100", "key"): Config(rows=64, columns=32, warps=8),
    ("gfx942", "key"): Config(rows=64, columns=32, warps=4),
    ("interpreter", "key"): Config(rows=4, columns=16, warps=1),
}
FURTHEST = 1 << 24  # elements from a token to the next: within a chunk, and within a row, addresses have 32 bits
FOLD_BLOCK = 256  # elements of a state that one program folds


def architecture(x: Tensor) -> str:
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(x.device)[0], "sm_100")


@triton.jit
def _summary_kernel(
    terms, chunks, transition, local, num_heads, key_dim, value_dim,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, PER_TOKEN: tl.constexpr, COMPLEX: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """P = exp(sum_t G_t), and the state from zero; in the backward, from q and do, the gradient of the first state."""
    k, v, log_decay, step = terms.k, terms.v, terms.log_decay, terms.step
    chunk, head, tile = place(num_heads, value_dim, BLOCK_C, FOLD)
    start, row, length = chunk_rows(chunks, chunk, BLOCK_T)
    if length <= 0:
        return
    columns = tile_columns(head, tile, num_heads, value_dim, BLOCK_C, FOLD)
    rows = Rows(start, row, row < length)
    v_tile = value_tile(v, rows, columns)
    # A token's write decays by later tokens; its read has decayed by tokens up to it.
    row = row if BACKWARD else row + 1
    passed = Rows(start, row, row < length)
    row = tl.arange(0, 1)[:, None]
    step_tile, step_first = None, None
    if step is not None:
        step_tile = value_tile(step, passed, columns)
    first = Rows(start, row, row < length)
    if step is not None:
        step_first = value_tile(step, first, columns)
    size = num_heads * key_dim * value_dim
    transition, local = transition + chunk * size, local + chunk * size
    for key in range(key_dim):
        g = log_decay_tile(log_decay, step_tile, passed, columns, key, COMPLEX, PER_TOKEN)
        passing = Complex(tl.cumsum(g.real, 0, reverse=not BACKWARD), tl.cumsum(g.imaginary, 0, reverse=not BACKWARD))
        decay = exp(passing, COMPLEX)
        x = times(decay, key_tile(k, rows, columns, key, COMPLEX, FOLD), COMPLEX)
        if COMPLEX and BACKWARD:
            x = conjugate(x)
        total = sum_along(g, 0)
        if not BACKWARD:
            g = log_decay_tile(log_decay, step_first, first, columns, key, COMPLEX, PER_TOKEN)
            total = plus(total, sum_along(g, 0))
        total = exp(total, COMPLEX)
        state = columns.head * key_dim * value_dim + key * value_dim + columns.channel
        store(transition, state, total, columns.mask, COMPLEX)
        store(local, state, sum_along(scaled(x, v_tile), 0), columns.mask, COMPLEX)


@triton.jit
def _fold_kernel(
    transition, local, carry, last, first_chunk, size,
    BLOCK: tl.constexpr, COMPLEX: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Go through a document's chunks and store in `local` the state that each of them receives."""
    tiles = tl.cdiv(size, BLOCK)
    document = (tl.program_id(0) // tiles).to(tl.int64)
    element = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    zero = tl.zeros([BLOCK], tl.float32)
    x = Complex(zero, zero)
    if carry is not None:
        x = load(carry, document * size + element, mask, COMPLEX)
    begin, end = tl.load(first_chunk + document), tl.load(first_chunk + document + 1)
    for index in range(begin, end):
        chunk = begin + end - 1 - index if BACKWARD else index
        offset = chunk * size + element
        a = load(transition, offset, mask, COMPLEX)
        y = load(local, offset, mask, COMPLEX)
        store(local, offset, x, mask, COMPLEX)
        if BACKWARD:
            a = conjugate(a)
        x = plus(times(x, a, COMPLEX), y)
    store(last, document * size + element, x, mask, COMPLEX)


@triton.jit
def _read_kernel(
    terms, chunks, starts, o, num_heads, key_dim, value_dim,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, PER_TOKEN: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    q, k, v, log_decay, step = terms
    chunk, head, tile = place(num_heads, value_dim, BLOCK_C, FOLD)
    start, row, length = chunk_rows(chunks, chunk, BLOCK_T)
    if length <= 0:
        return
    rows = Rows(start, row, row < length)
    columns = tile_columns(head, tile, num_heads, value_dim, BLOCK_C, FOLD)
    v_tile = value_tile(v, rows, columns)
    step_tile = None
    if step is not None:
        step_tile = value_tile(step, rows, columns)
    starts += chunk * num_heads * key_dim * value_dim
    o_tile = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for key in range(key_dim):
        a = exp(log_decay_tile(log_decay, step_tile, rows, columns, key, COMPLEX, PER_TOKEN), COMPLEX)
        k_key = key_tile(k, rows, columns, key, COMPLEX, FOLD)
        q_key = key_tile(q, rows, columns, key, COMPLEX, FOLD)
        a, s = scan(a, scaled(k_key, v_tile), False, COMPLEX)
        state = columns.head * key_dim * value_dim + key * value_dim + columns.channel
        s = plus(s, times(a, load(starts, state, columns.mask, COMPLEX), COMPLEX))
        o_tile += times(q_key, s, COMPLEX).real
    width = num_heads * value_dim
    o += rows.start * width
    tl.store(o + rows.row * width + columns.head * value_dim + columns.channel, o_tile, mask=rows.mask & columns.mask)


@triton.jit
def _step_kernel(
    terms, initial_state, o, final_state, num_heads, key_dim, value_dim,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, PER_TOKEN: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """One token per row: read the state, decay it, write to it, and store it and the output of the query."""
    q, k, v, log_decay, step = terms
    token, head, number = place(num_heads, value_dim, BLOCK_C, FOLD)
    columns = tile_columns(head, number, num_heads, value_dim, BLOCK_C, FOLD)
    this = Rows(token, 0, columns.mask)
    v_tile = value_tile(v, this, columns)
    step_tile = None
    if step is not None:
        step_tile = value_tile(step, this, columns)
    first_element = token * num_heads * key_dim * value_dim
    o_tile = tl.zeros([1, BLOCK_C], tl.float32)
    for first_key in range(0, key_dim, BLOCK_K):
        key = first_key + tl.arange(0, BLOCK_K)[:, None]
        keys = Rows(token, 0, key < key_dim)
        tile = Columns(columns.head, columns.channel, keys.mask & columns.mask)
        state = columns.head * key_dim * value_dim + key * value_dim + columns.channel
        s = scaled(key_tile(k, keys, tile, key, COMPLEX, FOLD), v_tile)
        if initial_state is not None:
            a = exp(log_decay_tile(log_decay, step_tile, keys, tile, key, COMPLEX, PER_TOKEN), COMPLEX)
            x = load(initial_state + first_element, state, tile.mask, COMPLEX)
            s = plus(s, times(a, x, COMPLEX))
        store(final_state + first_element, state, s, tile.mask, COMPLEX)
        if o is not None:
            q_key = key_tile(q, keys, tile, key, COMPLEX, FOLD)
            o_tile += tl.sum(times(q_key, s, COMPLEX).real, 0, keep_dims=True)
    if o is not None:
        o += token * num_heads * value_dim
        tl.store(o + columns.head * value_dim + columns.channel, o_tile, mask=columns.mask)


class Problem:
    """The arguments of one call in the form that the kernels take."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step: Tensor | None, cu_seqlens):
        batch_size, length, num_heads, value_dim = v.shape
        self.num_tokens, self.key_dim = batch_size * length, k.shape[-1]
        self.dtype = torch.complex64 if any(x.is_complex() for x in (q, k, log_decay)) else torch.float32
        self.fold = q.dim() == 2 and k.dim() == 2
        config = CONFIGS[architecture(v), "constant" if self.fold else "token"]
        block_t = config.rows
        self.columns = num_heads * value_dim if self.fold else value_dim
        block_c = max(16, min(config.columns, triton.next_power_of_2(self.columns)))
        self.one_token = cu_seqlens is None and length == 1
        self.num_documents = batch_size if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.num_chunks = triton.cdiv(length, block_t) * batch_size + (0 if cu_seqlens is None else self.num_documents)
        self.heads = 1 if self.fold else num_heads  # that programs have one each of
        self.tiles = triton.cdiv(self.columns, block_c)
        self.grid = (self.num_chunks * self.heads * self.tiles,)
        self.matrix, self.v = (num_heads, self.key_dim, value_dim), v
        self.shape = dict(
            num_heads=num_heads, key_dim=self.key_dim, value_dim=value_dim,
            FOLD=self.fold, PER_TOKEN=log_decay.dim() == 5, COMPLEX=self.dtype.is_complex,
        )  # fmt: skip
        self.tile = dict(BLOCK_T=block_t, BLOCK_C=block_c, num_warps=config.warps)
        self.given, self.cu_seqlens = (q, k, log_decay, step), cu_seqlens

    def states(self, rows: int) -> Tensor:
        return self.v.new_empty((rows, *self.matrix), dtype=self.dtype)

    def given_states(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(self.dtype).resolve_conj().contiguous()

    def terms(self) -> Terms:
        q, k, log_decay, step = self.given
        q, k = (x if x.dim() == 4 or self.fold else x.expand(*self.v.shape[:2], -1, -1) for x in (q, k))
        return Terms(
            q=self.strided(q),
            k=self.strided(k),
            v=strided(self.v),
            log_decay=self.strided(log_decay),
            step=None if step is None else strided(step),
        )

    def cut(self) -> tuple[Tensor, Tensor]:
        """Where chunks start and end, and each document's first chunk."""
        return _cut(self.v, self.cu_seqlens, self.tile["BLOCK_T"], self.num_chunks)

    def strided(self, x: Tensor) -> Strided | StridedDecay:
        return strided(x.to(self.dtype).resolve_conj() if self.dtype.is_complex else x)

    def summary_and_fold(
        self, terms: Terms, chunks: Tensor, first_chunk: Tensor, carry: Tensor | None, *, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the state that each chunk receives, and the state at the end (in the backward: the start) of
        documents."""
        transition, local, last = (self.states(n) for n in (self.num_chunks, self.num_chunks, self.num_documents))
        if last.numel() and self.num_chunks:
            _summary_kernel[self.grid](
                terms, chunks, raw(transition), raw(local), **self.shape, **self.tile, BACKWARD=backward
            )  # fmt: skip
        if last.numel():
            size = last[0].numel()
            _fold_kernel[(self.num_documents * triton.cdiv(size, FOLD_BLOCK),)](
                raw(transition), raw(local), raw(self.given_states(carry)), raw(last), first_chunk, size,
                BLOCK=FOLD_BLOCK, COMPLEX=self.dtype.is_complex, BACKWARD=backward,
            )  # fmt: skip
        return local, last

    def step(self, initial_state: Tensor | None, o: Tensor) -> Tensor:
        """The state after one token a row; fills o, unless it is empty."""
        config = CONFIGS[architecture(self.v), "key"]
        block_k = min(config.rows, triton.next_power_of_2(self.key_dim))
        block_c = min(config.rows * config.columns // block_k, triton.next_power_of_2(self.columns))
        last = self.states(self.num_documents)
        if last.numel():
            _step_kernel[(self.num_documents * self.heads * triton.cdiv(self.columns, block_c),)](
                self.terms(), raw(self.given_states(initial_state)), o if o.numel() else None, raw(last),
                **self.shape, BLOCK_K=block_k, BLOCK_C=block_c, num_warps=config.warps,
            )  # fmt: skip
        return last


def raw(x: Tensor | None) -> Tensor | None:
    """The form that kernels take: a complex number as 64 bits."""
    return x.view(torch.int64) if x is not None and x.is_complex() else x


def strided(x: Tensor) -> Strided | StridedDecay:
    """x [B, T, ...] or, the same for every token, [...]."""
    constant_decay = x.dim() == 3  # small, and read as it lies
    x = x.flatten(0, 1) if x.dim() > 3 else x[None]
    near = max(x.stride()[1:] if len(x) == 1 else x.stride()) <= FURTHEST
    x = x if near and (x.stride(-1) == 1 or constant_decay) else x.contiguous()
    return StridedDecay(raw(x), *x.stride()) if x.dim() == 4 else Strided(raw(x), *x.stride()[:2])


def _cut(v: Tensor, cu_seqlens: Tensor | None, chunk_size: int, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Where chunks start and end, int64 [chunks, 2], and each document's first chunk, int64 [N + 1].

    Only the device knows the number of chunks; unused entries start past their end.
    """
    if cu_seqlens is None:
        bounds = torch.arange(v.shape[0] + 1, device=v.device) * v.shape[1]
    else:
        bounds = cu_seqlens.clamp(0, v.shape[1]).long()
    first = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + chunk_size - 1) // chunk_size, 0, out=first[1:])
    chunk = torch.arange(num_chunks, device=v.device)
    document = (torch.searchsorted(first, chunk, right=True) - 1).clamp(max=bounds.shape[0] - 2)
    start = bounds[document] + (chunk - first[document]) * chunk_size
    return torch.stack([start, torch.minimum(start + chunk_size, bounds[document + 1])], 1), first


@torch.library.custom_op("torchlmoe::elementwise_recurrence_triton", mutates_args=())
def elementwise_recurrence(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    step: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o, the final state and, for the backward, each chunk's first state (none with one token per row).

    q, k: [B, T, H, K], or [H, K] if they are constant over tokens; real or complex. Without q, o is empty.
    v: [B, T, H, V], float32, float16 or bfloat16. log_decay: [B, T, H, K, V] or [H, K, V], real part <= 0.
    step: [B, T, H, V], times log_decay [H, K, V]. initial_state: [N, H, K, V]. cu_seqlens: int32 [N + 1], with B = 1.
    States are float32 or complex64.
    """
    problem = Problem(k if q is None else q, k, v, log_decay, step, cu_seqlens)
    o = v.new_empty(0 if q is None else v.shape)
    if problem.one_token:
        return o, problem.step(initial_state, o), problem.states(0)
    terms, (chunks, first_chunk) = problem.terms(), problem.cut()
    starts, final = problem.summary_and_fold(terms, chunks, first_chunk, initial_state, backward=False)
    if o.numel():
        _read_kernel[problem.grid](terms, chunks, raw(starts), o, **problem.shape, **problem.tile)
    return o, final, starts


@elementwise_recurrence.register_fake
def _(q, k, v, log_decay, step, initial_state, cu_seqlens):
    problem = Problem(k if q is None else q, k, v, log_decay, step, cu_seqlens)
    kept = 0 if problem.one_token else problem.num_chunks
    return v.new_empty(0 if q is None else v.shape), problem.states(problem.num_documents), problem.states(kept)


@register_flop_formula(torch.ops.torchlmoe.elementwise_recurrence_triton, get_raw=True)
def flops(q, k, v, log_decay, step, *rest, **kwargs) -> int:
    """FLOPs of the definition: decay, write, add, read, step times rate; a complex product is six, its real part
    four."""
    per_element = 14 + 2 * (step is not None) if k.is_complex() or log_decay.is_complex() else 5 + (step is not None)
    return v.numel() * k.shape[-1] * per_element
