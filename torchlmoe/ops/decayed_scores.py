"""Scores of one chunk, sum_d x_id y_jd exp(G_id - G_jd) for j <= i, without a positive exponent anywhere.

G is the inclusive cumulative sum of the log decay in the chunk. One class per kind of decay, each with `forward` and
`backward`; the gradient of the decay itself is had elsewhere, from the gradients of q, k and e (see `chunked.py`).

Legend: N chunks times heads, C tokens in a chunk, K key width.
"""

import torch
from torch import Tensor

SUB_BLOCK = 16


class UndecayedScores:
    """No decay: a plain masked product."""

    def forward(self, x_NCK: Tensor, y_NCK: Tensor, diagonal: int) -> Tensor:
        """[N, C, C], zero above `diagonal` (0 keeps the diagonal, -1 leaves it out)."""
        return torch.bmm(x_NCK, y_NCK.mT).tril(diagonal)

    def backward(self, grad_NCC: Tensor, x_NCK: Tensor, y_NCK: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and y; `grad_NCC` is already zero wherever the scores are."""
        return torch.bmm(grad_NCC, y_NCK), torch.bmm(grad_NCC.mT, x_NCK)


class ScalarDecayScores:
    """One decay per token and head: it multiplies the product."""

    def __init__(self, total_NC: Tensor):
        # total is float64: where gates are extreme the difference of two sums would lose an ordinary gate's digits.
        difference = (total_NC[:, :, None] - total_NC[:, None, :]).clamp_(max=0)
        self.decay_NCC: Tensor | None = None
        self._difference_NCC = difference

    def _decay(self, dtype: torch.dtype) -> Tensor:
        if self.decay_NCC is None:
            self.decay_NCC = self._difference_NCC.to(dtype).exp()
            del self._difference_NCC
        return self.decay_NCC

    def forward(self, x_NCK: Tensor, y_NCK: Tensor, diagonal: int) -> Tensor:
        return (torch.bmm(x_NCK, y_NCK.mT) * self._decay(x_NCK.dtype)).tril(diagonal)

    def backward(self, grad_NCC: Tensor, x_NCK: Tensor, y_NCK: Tensor) -> tuple[Tensor, Tensor]:
        grad_NCC = grad_NCC * self._decay(x_NCK.dtype)
        return torch.bmm(grad_NCC, y_NCK), torch.bmm(grad_NCC.mT, x_NCK)


class ChannelDecayScores:
    """One decay per token, head and key channel: blocks of 16 tokens.

    A block below the diagonal factorises around the sum at its first row, between its rows and its columns:
    exp(G_i - G_a) exp(G_a - G_j), neither exponent positive. A block on the diagonal takes pairwise differences.
    """

    def __init__(self, total_NCK: Tensor, dtype: torch.dtype):
        num, chunk_size, width = total_NCK.shape
        self.block = block = min(SUB_BLOCK, chunk_size)
        self.num_blocks = num_blocks = chunk_size // block
        total = total_NCK.view(num, num_blocks, block, width)
        pairwise = (total[:, :, :, None, :] - total[:, :, None, :, :]).clamp_(max=0)
        self.within = pairwise.to(dtype).exp_().flatten(0, 1)  # [N * blocks, i, j, K]
        # exp(G_i - G_a) for the rows of each block, exp(G_a - G_j) for all that stands before it.
        self.rows = (total - total[:, :, :1]).to(dtype).exp_()
        self.columns = [
            (total[:, index, :1] - total_NCK[:, : index * block]).clamp_(max=0).to(dtype).exp_()
            for index in range(1, num_blocks)
        ]

    def _blocks(self, x_NCK: Tensor) -> Tensor:
        return x_NCK.reshape(-1, self.block, x_NCK.shape[-1])

    def _row_block(self, x_NCK: Tensor, index: int) -> Tensor:
        return x_NCK[:, index * self.block : (index + 1) * self.block] * self.rows[:, index]

    def forward(self, x_NCK: Tensor, y_NCK: Tensor, diagonal: int) -> Tensor:
        num, chunk_size, _ = x_NCK.shape
        x, y = self._blocks(x_NCK), self._blocks(y_NCK)
        weighted = self.within * y[:, None]  # [., i, j, K]
        on_diagonal = torch.matmul(weighted, x[..., None])[..., 0].tril(diagonal)
        on_diagonal = on_diagonal.view(num, self.num_blocks, self.block, self.block)
        rows = [torch.nn.functional.pad(on_diagonal[:, 0], (0, chunk_size - self.block))]
        for index in range(1, self.num_blocks):
            before = index * self.block
            left = torch.bmm(self._row_block(x_NCK, index), (y_NCK[:, :before] * self.columns[index - 1]).mT)
            row = torch.cat([left, on_diagonal[:, index]], -1)
            rows.append(torch.nn.functional.pad(row, (0, chunk_size - before - self.block)))
        return torch.cat(rows, 1)

    def backward(self, grad_NCC: Tensor, x_NCK: Tensor, y_NCK: Tensor) -> tuple[Tensor, Tensor]:
        num = x_NCK.shape[0]
        x, y = self._blocks(x_NCK), self._blocks(y_NCK)
        grad_blocks = grad_NCC.view(num, self.num_blocks, self.block, self.num_blocks, self.block)
        on_diagonal = grad_blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)  # [., i, j]
        decayed_grad = self.within * on_diagonal[..., None]
        grad_x = (decayed_grad * y[:, None]).sum(2).view_as(x_NCK)
        grad_y = (decayed_grad * x[:, :, None]).sum(1).view_as(y_NCK)
        for index in range(1, self.num_blocks):
            before = index * self.block
            rows = slice(before, before + self.block)
            left = grad_NCC[:, rows, :before]
            columns = self.columns[index - 1]
            grad_x[:, rows] += torch.bmm(left, y_NCK[:, :before] * columns) * self.rows[:, index]
            grad_y[:, :before] += torch.bmm(left.mT, self._row_block(x_NCK, index)) * columns
        return grad_x, grad_y
