import pytest
import torch

from torchlmoe.ops.row_sum import row_sum


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (255, 2), (256, 3), (1000, 5), (777, 4, 3), (512,)])
def test_row_sum(shape):
    """Few rows, rows that the parts do not divide, and rows of two dimensions."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(row_sum(x), x.sum(0), rtol=1e-13, atol=1e-13)


def test_the_order_of_sums_does_not_depend_on_threads():
    x = torch.randn(4099, 64, generator=torch.Generator().manual_seed(0))
    threads, sums = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            sums.append(row_sum(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
