"""The kernels elementwise_recurrence: equal the recurrence token by token, with its gradients."""

import pytest
import torch

from torchlmoe.vendoring.checks.by_formula import DEVICE, assert_equals_formula, random_tensors
from torchlmoe.vendoring.checks.element_by_element import element_by_element

SPANS = [0, 3, 3, 40]  # bounds of documents


@pytest.mark.parametrize("rates", ["per token", "with a step", "constant"])
def test_elementwise_kernels(rates):
    from torchlmoe.kernels.elementwise_recurrence_backward import elementwise_recurrence

    of_token = () if rates == "constant" else (1, 40)
    shapes = [(*of_token, 2, 4), (*of_token, 2, 4), (1, 40, 2, 8)]
    shapes += [((1, 40) if rates == "per token" else ()) + (2, 4, 8), (3, 2, 4, 8)]
    q, k, v, log_decay, first = random_tensors(*shapes)
    steps = [x.abs() for x in random_tensors((1, 40, 2, 8))] if rates == "with a step" else []
    bounds = torch.tensor(SPANS, dtype=torch.int32, device=DEVICE)

    def kernel(q, k, v, log_decay, first, step=None):
        return elementwise_recurrence(q, k, v, log_decay, step, first, bounds)[:2]

    def formula(q, k, v, log_decay, first, step=None):
        return element_by_element(q, k, v, log_decay=log_decay, step=step, initial_state=first, cu_seqlens=bounds)

    assert_equals_formula(kernel, formula, [q, k, v, -log_decay.abs() / 4, first, *steps], 1e-4)


def test_elementwise_kernel_of_one_token():
    from torchlmoe.kernels.elementwise_recurrence_backward import elementwise_recurrence

    shapes = ((2, 9, 2, 4), (2, 9, 2, 4), (2, 9, 2, 8), (2, 9, 2, 4, 8))
    q, k, v, decay = (x.float().to(DEVICE) / 4 for x in random_tensors(*shapes))
    o, last, _ = elementwise_recurrence(q, k, v, -decay.abs(), None, None, None)
    state = None
    for t in range(9):
        q_t, k_t, v_t, decay_t = (x[:, t : t + 1].contiguous() for x in (q, k, v, -decay.abs()))
        o_t, state, _ = elementwise_recurrence(q_t, k_t, v_t, decay_t, None, state, None)
        torch.testing.assert_close(o_t, o[:, t : t + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)
