"""Decay between the tokens of a chunk, on the key side or the value side, without positive exponents.

All products of a chunk's tokens are derivatives of one form of readers x, writers y and scores P:

    sum_ijd P_ij x_id y_jd E_ijd        E_ijd = exp(G_id - G_jd) for j < i, 1 for j = i, 0 for j > i

`pair` is its derivative by P (the scores of x and y), `rows` by x, `columns` by y. G is the inclusive cumulative sum of
the log decay. A read before the token's own decay (RWKV-6) uses the exclusive sum in place of G_id.

Legend: N chunks times heads, C tokens per chunk, R readers and W writers per token, D width, G groups of equal decay.
"""

import torch
from torch import Tensor


class Undecayed:
    """E is one everywhere, for scores that are already zero above the diagonal."""

    from_start: Tensor | None = None  # exp of the sum from the chunk's start to each token, [N, C, 1 or D]
    to_end: Tensor | None = None  # from after each token to the chunk's end, [N, C, 1 or D]
    whole: Tensor | None = None  # of the whole chunk, [N, 1 or D]

    def pair(self, x_NCRD: Tensor, y_NCWD: Tensor) -> Tensor:
        """[N, C, R, C, W]"""
        product = torch.bmm(x_NCRD.flatten(1, 2), y_NCWD.flatten(1, 2).mT)
        return product.view(*x_NCRD.shape[:3], *y_NCWD.shape[1:3])

    def rows(self, p_NCRCW: Tensor, y_NCWD: Tensor, onto_NCRD: Tensor) -> Tensor:
        """Adds [N, C, R, D] to `onto`, in place."""
        onto_NCRD.flatten(1, 2).baddbmm_(p_NCRCW.flatten(3).flatten(1, 2), y_NCWD.flatten(1, 2))
        return onto_NCRD

    def columns(self, p_NCRCW: Tensor, x_NCRD: Tensor) -> Tensor:
        """[N, C, W, D]"""
        return torch.bmm(p_NCRCW.flatten(3).flatten(1, 2).mT, x_NCRD.flatten(1, 2)).unflatten(1, p_NCRCW.shape[3:])

    def backward(self, p_NCRCW: Tensor, x_NCRD: Tensor, y_NCWD: Tensor, dx_NCRD: Tensor, dy_NCWD: Tensor) -> None:
        """Add `rows` to dx and `columns` to dy. Overwrites p."""
        self.rows(p_NCRCW, y_NCWD, dx_NCRD)
        dy_NCWD.flatten(1, 2).baddbmm_(p_NCRCW.flatten(3).flatten(1, 2).mT, x_NCRD.flatten(1, 2))


class CausalMask(Undecayed):
    """E is a matrix of ones up to the diagonal."""

    def __init__(self, chunk_size: int, like: Tensor):
        self.matrix_GC1C1 = like.new_ones(chunk_size, chunk_size).tril_()[None, :, None, :, None]

    def _weigh(self, p_NCRCW: Tensor) -> Tensor:
        """In place."""
        p_NCRCW.unflatten(0, (-1, self.matrix_GC1C1.shape[0])).mul_(self.matrix_GC1C1)
        return p_NCRCW

    def pair(self, x_NCRD: Tensor, y_NCWD: Tensor) -> Tensor:
        return self._weigh(super().pair(x_NCRD, y_NCWD))

    def backward(self, p_NCRCW: Tensor, x_NCRD: Tensor, y_NCWD: Tensor, dx_NCRD: Tensor, dy_NCWD: Tensor) -> None:
        super().backward(self._weigh(p_NCRCW), x_NCRD, y_NCWD, dx_NCRD, dy_NCWD)


class MatrixDecay(CausalMask):
    """One decay per token and head, or one per head: the matrix of the latter is that of every chunk.

    log_decay_NC: of every chunk, zero at padded tokens. log_decay_GC: of G chunks whose matrices repeat for all
    chunks. With reads_before the diagonal is left out: the bonus replaces it. Sums are float64: with
    extreme gates the difference of two float32 sums would lose the digits of an ordinary gate.
    A gate of -800 or less, -inf included, lets nothing through in any dtype.
    """

    def __init__(self, log_decay_NC: Tensor, log_decay_GC: Tensor, reads_before: bool, dtype: torch.dtype):
        read, write = self._sums(log_decay_GC, reads_before)
        exponent = torch.empty(*write.shape, write.shape[1], dtype=dtype, device=write.device)
        torch.sub(read[:, :, None], write[:, None, :], out=exponent)
        unseen = exponent.new_full(exponent.shape[1:], -torch.inf).triu_(1 - reads_before)
        self.matrix_GC1C1 = exponent.add_(unseen).exp_()[:, :, None, :, None]
        if log_decay_GC is not log_decay_NC:
            read, write = self._sums(log_decay_NC, reads_before)
        self.from_start = read.to(dtype).exp()[..., None]
        self.to_end = (write[:, -1:] - write).to(dtype).exp()[..., None]
        self.whole = write[:, -1:].to(dtype).exp()

    @staticmethod
    def _sums(log_decay_NC: Tensor, reads_before: bool) -> tuple[Tensor, Tensor]:
        """From the chunk's start to where each token reads, and to after its own decay; float64."""
        log_decay_NC = log_decay_NC.double().clamp_min(-800)
        total = log_decay_NC.cumsum(1)
        return total - log_decay_NC if reads_before else total, total


class ChannelDecay(Undecayed):
    """One decay per token, head and channel: a chunk of 2^n tokens is halved down to pairs of single tokens.

    If the reader is in the later half of a block and the writer in the earlier half, E is a product of two factors:
    from the middle to the reader, and from the writer to the middle. A block's factors are those of its halves times
    exp of the other half's sum: nothing is subtracted, and most of the work is products.
    """

    def __init__(self, log_decay_NCD: Tensor, reads_before: bool):
        length = log_decay_NCD.shape[1]
        read = torch.ones_like(log_decay_NCD)  # from the block's start to the token
        if not reads_before:
            read *= log_decay_NCD.exp()
        write = torch.ones_like(log_decay_NCD)  # from after the token to its block's end
        total = log_decay_NCD.unsqueeze(2)  # the log decay of every block, [N, blocks, 1, D]
        # Size of half a block, and the factors of readers and writers [N, blocks, size, 1, D].
        self.levels: list[tuple[int, Tensor, Tensor]] = []
        size = 1
        while size < length:
            later, earlier = (x.unflatten(1, (-1, 2, size))[:, :, half] for x, half in ((read, 1), (write, 0)))
            self.levels.append((size, later.clone().unsqueeze(3), earlier.clone().unsqueeze(3)))
            total = total.unflatten(1, (-1, 2))
            decay = total.exp()
            later *= decay[:, :, 0]
            earlier *= decay[:, :, 1]
            total = total.sum(2)
            size *= 2
        self.from_start, self.to_end, self.whole = read, write, total[:, 0, 0].exp()

    def _block(self, p_NCRCW: Tensor, size: int) -> Tensor:
        """Return the scores of later halves that read earlier ones: a view [N, size, R, size, W, blocks]."""
        halves = p_NCRCW.unflatten(3, (-1, 2, size)).unflatten(1, (-1, 2, size))
        return halves[:, :, 1].select(5, 0).diagonal(dim1=1, dim2=4)

    def _flat_block(self, p_NCRCW: Tensor, size: int) -> Tensor:
        """[N * blocks, size * R, size * W]"""
        return self._block(p_NCRCW, size).movedim(5, 1).reshape(-1, size * p_NCRCW.shape[2], size * p_NCRCW.shape[4])

    def pair(self, x_NCRD: Tensor, y_NCWD: Tensor) -> Tensor:
        scores = x_NCRD.new_zeros(*x_NCRD.shape[:3], *y_NCWD.shape[1:3])
        scores.diagonal(dim1=1, dim2=3).copy_((x_NCRD.unsqueeze(3) * y_NCWD.unsqueeze(2)).sum(-1).movedim(1, 3))
        for size, later, earlier in self.levels:
            x = (_half(x_NCRD, size, 1) * later).flatten(2, 3).flatten(0, 1)
            y = (_half(y_NCWD, size, 0) * earlier).flatten(2, 3).flatten(0, 1)
            block = self._block(scores, size)
            product = torch.bmm(x, y.mT).view(block.shape[0], block.shape[5], *block.shape[1:5])
            block.copy_(product.movedim(1, 5))
        return scores

    def rows(self, p_NCRCW: Tensor, y_NCWD: Tensor, onto_NCRD: Tensor) -> Tensor:
        onto_NCRD += thin_matmul(p_NCRCW.diagonal(dim1=1, dim2=3).movedim(3, 1), y_NCWD)
        for size, later, earlier in self.levels:
            y = (_half(y_NCWD, size, 0) * earlier).flatten(2, 3).flatten(0, 1)
            half = _half(onto_NCRD, size, 1)
            half.addcmul_(thin_matmul(self._flat_block(p_NCRCW, size), y).view(half.shape), later)
        return onto_NCRD

    def gradient(
        self, p_NCRCW: Tensor | None, x_NCRD: Tensor, y_NCWD: Tensor, dx_NCRD: Tensor, dy_NCWD: Tensor,
        through_ND: Tensor, reads_before: bool,
    ) -> Tensor:  # fmt: skip
        """Add `rows` to dx and `columns` to dy, and return the gradient of the log decay [N, C, D].

        dx holds the reads of x from the chunk's first state, and dy the writes of y to its last state. through: the
        part that passes from the first state to the last. Without readers there is no P.
        """
        read_NCD, written_NCD = (x_NCRD * dx_NCRD).sum(2), (y_NCWD * dy_NCWD).sum(2)
        passing = through_ND.unsqueeze(1)  # the same for all tokens of a block, [N, blocks, D]
        for size, later, earlier in reversed(self.levels):
            # Both reach to a border of the block, so they pass through the whole half between.
            read, written = _half(read_NCD, size, 1), _half(written_NCD, size, 0)
            passing = torch.stack([passing + read.sum(2), passing + written.sum(2)], 2).flatten(1, 2)
            if p_NCRCW is None:
                continue
            block, x, y = self._flat_block(p_NCRCW, size), _half(x_NCRD, size, 1), _half(y_NCWD, size, 0)
            dx = thin_matmul(block, (y * earlier).flatten(2, 3).flatten(0, 1)).view(x.shape) * later
            dy = thin_matmul(block.mT, (x * later).flatten(2, 3).flatten(0, 1)).view(y.shape) * earlier
            _half(dx_NCRD, size, 1).add_(dx)
            _half(dy_NCWD, size, 0).add_(dy)
            read += (x * dx).sum(3)
            written += (y * dy).sum(3)
        if p_NCRCW is not None:
            own = p_NCRCW.diagonal(dim1=1, dim2=3).movedim(3, 1)
            dx_NCRD += thin_matmul(own, y_NCWD)
            dy_NCWD += thin_matmul(own.mT, x_NCRD)
        return passing if reads_before else passing + read_NCD


def _half(x_NCRD: Tensor, size: int, half: int) -> Tensor:
    """The earlier (0) or later (1) halves of all blocks of 2 * size tokens: a view [N, blocks, size, R, D]."""
    return x_NCRD.unflatten(1, (-1, 2, size))[:, :, half]


def thin_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[..., m, k] @ [..., k, n]; a small k is computed as multiply-adds, several times faster on a CPU."""
    if a.shape[-1] > 4:
        return torch.matmul(a, b)
    product = a[..., :1] * b[..., :1, :]
    for index in range(1, a.shape[-1]):
        product = torch.addcmul(product, a[..., index, None], b[..., index, None, :])
    return product
