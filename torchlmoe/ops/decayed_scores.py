"""Scores of one chunk, sum_d x_id y_jd exp(G_id - G_jd) for j <= i, without a positive exponent anywhere.

G is the inclusive cumulative sum of the log decay in the chunk. One class per kind of decay, each with `forward` and
`backward`; the gradient of the decay itself is had elsewhere, from the gradients of x and y (see `chunked.py`).

Legend: N chunks times heads, R readers that share y (q, and what is erased), C tokens in a chunk, K key width.
"""

import torch
from torch import Tensor

SUB_BLOCK = 16


class UndecayedScores:
    """No decay: a plain masked product."""

    def forward(self, x_NRCK: Tensor, y_NCK: Tensor) -> Tensor:
        """[N, R, C, C], zero above the diagonal."""
        return _product(x_NRCK, y_NCK).tril_()

    def backward(self, grad_NRCC: Tensor, x_NRCK: Tensor, y_NCK: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and y from that of the scores, whose part above the diagonal is left out; may change it."""
        return _product_backward(grad_NRCC.tril_(), x_NRCK, y_NCK)


class ScalarDecayScores:
    """One decay per token and head: it multiplies the product."""

    def __init__(self, total_NC: Tensor, dtype: torch.dtype):
        # total is float64: where gates are extreme the difference of two sums would lose an ordinary gate's digits.
        difference = (total_NC[:, :, None] - total_NC[:, None, :]).to(dtype)
        later = torch.ones(difference.shape[1:], dtype=torch.bool, device=difference.device).triu_(1)
        self.decay_N1CC = difference.masked_fill_(later, -torch.inf).exp_()[:, None]

    def forward(self, x_NRCK: Tensor, y_NCK: Tensor) -> Tensor:
        return _product(x_NRCK, y_NCK) * self.decay_N1CC

    def backward(self, grad_NRCC: Tensor, x_NRCK: Tensor, y_NCK: Tensor) -> tuple[Tensor, Tensor]:
        return _product_backward(grad_NRCC.mul_(self.decay_N1CC), x_NRCK, y_NCK)


class ChannelDecayScores:
    """One decay per token, head and key channel: blocks of 16 tokens.

    A block below the diagonal factorises around the sum at its first row, between its rows and its columns:
    exp(G_i - G_a) exp(G_a - G_j), neither exponent positive. A block on the diagonal takes pairwise differences.
    """

    def __init__(self, total_NCK: Tensor, dtype: torch.dtype):
        num, chunk_size, width = total_NCK.shape
        self.block = block = min(SUB_BLOCK, chunk_size)
        self.num_blocks = chunk_size // block
        total = total_NCK.view(num, self.num_blocks, block, width)
        pairwise = (total[:, :, :, None, :] - total[:, :, None, :, :]).to(dtype)
        self.within = pairwise.clamp_(max=0).exp_().flatten(0, 1)  # [N * blocks, i, j, K]
        # exp(G_i - G_a) for the rows of each block, exp(G_a - G_j) for all that stands before it.
        self.rows = (total - total[:, :, :1]).to(dtype).exp_()
        self.columns = [
            (total[:, index, :1] - total_NCK[:, : index * block]).clamp_(max=0).to(dtype).exp_()
            for index in range(1, self.num_blocks)
        ]

    def _by_block(self, x_NRCK: Tensor) -> Tensor:
        """[N, R, C, K] -> [N * blocks, i, K, R]."""
        return x_NRCK.unflatten(2, (-1, self.block)).permute(0, 2, 3, 4, 1).flatten(0, 1)

    def _row_block(self, x_NRCK: Tensor, index: int) -> Tensor:
        """The rows of one block, decayed from its first: [N, R * i, K]."""
        rows = x_NRCK[:, :, index * self.block : (index + 1) * self.block] * self.rows[:, None, index]
        return rows.flatten(1, 2)

    def forward(self, x_NRCK: Tensor, y_NCK: Tensor) -> Tensor:
        num, num_readers, chunk_size, _ = x_NRCK.shape
        y = y_NCK.reshape(-1, self.block, y_NCK.shape[-1])
        within = torch.matmul(self.within * y[:, None], self._by_block(x_NRCK))  # [N * blocks, i, j, R]
        within = within.permute(3, 0, 1, 2).tril().unflatten(1, (num, self.num_blocks))
        rows = []
        for index in range(self.num_blocks):
            parts = [within[:, :, index].transpose(0, 1)]
            if before := index * self.block:
                left = torch.bmm(self._row_block(x_NRCK, index), (y_NCK[:, :before] * self.columns[index - 1]).mT)
                parts.insert(0, left.unflatten(1, (num_readers, -1)))
            if after := chunk_size - before - self.block:
                parts.append(parts[-1].new_zeros(num, num_readers, self.block, after))
            rows.append(torch.cat(parts, -1))
        return torch.cat(rows, 2)

    def backward(self, grad_NRCC: Tensor, x_NRCK: Tensor, y_NCK: Tensor) -> tuple[Tensor, Tensor]:
        num, num_readers = x_NRCK.shape[:2]
        blocks = grad_NRCC.unflatten(3, (-1, self.block)).unflatten(2, (-1, self.block))
        within = blocks.diagonal(dim1=2, dim2=4).permute(0, 4, 2, 3, 1).flatten(0, 1)  # [N * blocks, i, j, R]
        within = (
            within * torch.ones(self.block, self.block, dtype=within.dtype, device=within.device).tril_()[..., None]
        )
        y = y_NCK.reshape(-1, self.block, y_NCK.shape[-1])
        grad_x = torch.matmul((self.within * y[:, None]).mT, within)  # [N * blocks, i, K, R]
        grad_x = grad_x.unflatten(0, (num, -1)).permute(0, 4, 1, 2, 3).flatten(2, 3)
        grad_y = (torch.matmul(within, self._by_block(x_NRCK).mT) * self.within).sum(1).view_as(y_NCK)
        for index in range(1, self.num_blocks):
            before = index * self.block
            rows = slice(before, before + self.block)
            left = grad_NRCC[:, :, rows, :before].flatten(1, 2)
            columns = self.columns[index - 1]
            from_left = torch.bmm(left, y_NCK[:, :before] * columns).unflatten(1, (num_readers, -1))
            grad_x[:, :, rows] += from_left * self.rows[:, None, index]
            grad_y[:, :before] += torch.bmm(left.mT, self._row_block(x_NRCK, index)) * columns
        return grad_x, grad_y


Scores = UndecayedScores | ScalarDecayScores | ChannelDecayScores


def _product(x_NRCK: Tensor, y_NCK: Tensor) -> Tensor:
    return torch.bmm(x_NRCK.flatten(1, 2), y_NCK.mT).unflatten(1, x_NRCK.shape[1:3])


def _product_backward(grad_NRCC: Tensor, x_NRCK: Tensor, y_NCK: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad_NRCC.flatten(1, 2)
    grad_x = torch.bmm(grad, y_NCK).unflatten(1, x_NRCK.shape[1:3])
    return grad_x, torch.bmm(grad.mT, x_NRCK.flatten(1, 2))
