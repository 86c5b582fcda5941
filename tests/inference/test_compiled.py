"""The plain forms that a compiled step takes in place of operations; the step itself by Inductor."""

import pytest
import torch

from tests.inference.test_generate import build, prompts
from torchlmoe.inference.compiled import backend, opened
from torchlmoe.inference.generate import generate


def cases(dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    experts = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(7)])
    slots = torch.ops.torchlmoe.sort_slots(experts, 5, 1)
    token_M = slots[0] // 2
    ties = torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0, 2.0]], dtype=dtype)
    return {
        "causal_conv": [
            (draw(2, length, 3), draw(3, 4), None, flag) for length, flag in ((9, True), (2, False), (1, True))
        ],
        "weighted_swiglu": [(draw(7, 8), draw(7).float())],
        "grouped_matmul": [(draw(4, 8), draw(5, 16, 8), torch.tensor([0, 2, 2, 3, 4], dtype=torch.int32))],
        "top_indices": [(draw(7, 6), 3), (ties, 2), (ties, 5)],
        "sort_slots": [(experts, 5, 1), (experts[:1], 5, 1)],
        "gather_slots": [(draw(7, 3), token_M, slots[1])],
        "sum_slots": [(draw(14, 3), token_M, slots[1]), (draw(7, 3), token_M, slots[1][:, :1] // 2)],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_forms_equal_the_operations(dtype):
    assert {operation.name() for operation in opened()} == {f"torchlmoe::{name}" for name in cases(dtype)}
    for operation, form in opened().items():
        for arguments in cases(dtype)[operation.name().partition("::")[2]]:
            expected, found = operation(*arguments), form(*arguments)
            pairs = [(expected, found)] if isinstance(expected, torch.Tensor) else zip(expected, found, strict=True)
            for whole, plain in pairs:
                torch.testing.assert_close(plain, whole, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_what_has_no_plain_form_stays_closed():
    forms = {operation.name().partition("::")[2]: form for operation, form in opened().items()}
    x = torch.zeros(1, 4, 3)
    assert forms["causal_conv"](x, torch.zeros(3, 2), torch.tensor([0, 2, 4]), True) is NotImplemented
    assert forms["sort_slots"](torch.zeros(2, 2, dtype=torch.int64), 4, 8) is NotImplemented
    many = torch.zeros(6, 8), torch.zeros(5, 16, 8), torch.tensor([6] * 5, dtype=torch.int32)
    assert forms["grouped_matmul"](*many) is NotImplemented
    assert forms["gather_slots"](x.to("meta")[0], None, None) is NotImplemented


def test_operations_that_stay_closed_are_compiled_and_called():
    """More rows than experts, as many rows that decode together have."""
    torch._dynamo.reset()
    operation = torch.ops.torchlmoe.grouped_matmul
    x, weight = torch.randn(6, 8), torch.randn(5, 16, 8)
    offsets = torch.tensor([0, 2, 2, 3, 6], dtype=torch.int32)
    with torch.inference_mode():
        found = torch.compile(lambda *arguments: operation(*arguments), backend=backend)(x, weight, offsets)
        torch.testing.assert_close(found, operation(x, weight, offsets))


@pytest.mark.long
def test_a_step_compiled_by_inductor_generates_the_same():
    torch._dynamo.reset()
    model = build(*"--model.layer_pattern LN --model.layers.N.mlp_token_shift true --model.embedding_norm true".split())
    expected = generate(model, prompts(), max_new_tokens=12)
    assert generate(model, prompts(), max_new_tokens=12, compile=True) == expected
