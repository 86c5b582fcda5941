"""The kernels linear_recurrence: equal the recurrence token by token, with its gradients, and continue from a state."""

import pytest
import torch

from torchlmoe.vendoring.checks.by_formula import DEVICE, assert_equals_formula, random_tensors
from torchlmoe.vendoring.checks.token_by_token import token_by_token

HEAD_KEY, HEAD_VALUE, NUM_HEADS, NUM_TOKENS = 16, 16, 2, 70
ENDS_OF_DOCUMENTS = [0, 3, 3, 70]
NAMES = ("q", "k", "v", "log_decay", "erase", "erase_key", "value_log_decay", "bonus")
# Beside q, k and v: shapes after [1, tokens, heads]; of the bonus all of it.
GIVEN: dict[str, dict[str, tuple[int, ...]]] = {
    "nothing": {},
    "decay and delta rule": {"log_decay": (), "erase": ()},
    "decay per channel and delta rule": {"log_decay": (HEAD_KEY,), "erase": (HEAD_KEY,), "erase_key": (HEAD_KEY,)},
    "decay on both sides": {"log_decay": (HEAD_KEY,), "value_log_decay": (HEAD_VALUE,)},
    "bonus": {"log_decay": (HEAD_KEY,), "bonus": (NUM_HEADS, HEAD_KEY)},
}


@pytest.mark.parametrize("widths", GIVEN.values(), ids=GIVEN)
def test_recurrence_kernels(widths):
    from torchlmoe.kernels.linear_recurrence_backward import linear_recurrence

    of_token = (1, NUM_TOKENS, NUM_HEADS)
    shapes = {"q": (*of_token, HEAD_KEY), "k": (*of_token, HEAD_KEY), "v": (*of_token, HEAD_VALUE)}
    shapes["first"] = (len(ENDS_OF_DOCUMENTS) - 1, NUM_HEADS, HEAD_KEY, HEAD_VALUE)
    shapes |= {name: width if name == "bonus" else (*of_token, *width) for name, width in widths.items()}
    tensors = dict(zip(shapes, random_tensors(*shapes.values()), strict=True))
    for name in tensors:
        if "decay" in name:
            tensors[name] = -tensors[name].abs() / 4
        elif name != "v":
            tensors[name] = tensors[name].sigmoid() if shapes[name] == of_token else tensors[name] / 4
    bounds = torch.tensor(ENDS_OF_DOCUMENTS, dtype=torch.int32, device=DEVICE)

    def kernel(*values):
        given = dict(zip(tensors, values, strict=True))
        return linear_recurrence(*(given.get(name) for name in NAMES), 0.25, given["first"], bounds)

    def formula(*values):
        given = dict(zip(tensors, values, strict=True))
        first = given.pop("first")
        return token_by_token(**given, scale=0.25, initial_state=first, cu_seqlens=bounds)

    assert_equals_formula(kernel, formula, list(tensors.values()), 1e-4)


def test_recurrence_kernel_of_one_token():
    from torchlmoe.kernels.linear_recurrence_backward import linear_recurrence

    shapes = (
        (2, 9, NUM_HEADS, HEAD_KEY),
        (2, 9, NUM_HEADS, HEAD_KEY),
        (2, 9, NUM_HEADS, HEAD_VALUE),
        (2, 9, NUM_HEADS),
    )
    q, k, v, decay = (x.float().to(DEVICE) / 4 for x in random_tensors(*shapes))
    o, last = linear_recurrence(q, k, v, -decay.abs(), None, None, None, None, 1.0, None, None)
    state = None
    for t in range(9):
        q_t, k_t, v_t, decay_t = (x[:, t : t + 1].contiguous() for x in (q, k, v, -decay.abs()))
        o_t, state = linear_recurrence(q_t, k_t, v_t, decay_t, None, None, None, None, 1.0, state, None)
        torch.testing.assert_close(o_t, o[:, t : t + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)
