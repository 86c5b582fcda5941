"""Rules are inverted bit for bit, give the same shapes on the meta device, and say in a sentence what does not fit."""

import pytest
import torch

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop import (
    Rule,
    convert,
    deepseek_v2,
    kimi_linear,
    mamba,
    mamba2,
    minimax,
    mixtral,
    prefixed,
    qwen2_moe,
    qwen3_next,
)
from torchlmoe.interop.steps import Add, Flatten, Permute, Reorder, Split
from torchlmoe.mixers import MIXERS

STEPS = {  # steps, and shapes of what they take
    "split": (Split((1, 3)), [(4, 3)]),
    "split_equal": (Split(3, dim=1), [(2, 6)]),
    "split_groups": (Split((1, 2), groups=2), [(6, 2)]),
    "split_equal_groups": (Split(2, groups=3, dim=1), [(2, 12, 2)]),
    "join_groups": (Split((1, 2), groups=2).inverse, [(2, 3), (4, 3)]),
    "stack": (Split(3).inverse, [(2, 3)] * 3),
    "flatten": (Flatten((1, 4), dim=1), [(5, 1, 4), (3, 1, 4)]),
    "flatten_any": (Flatten((-1, 2)), [(3, 2, 5)]),
    "unflatten": (Flatten((3, -1)).inverse, [(12, 2)]),
    "reorder": (Reorder((2, 0, 1)), [(6, 2), (3,)]),
    "permute": (Permute((2, 0, 1)), [(2, 3, 4)]),
    "add": (Add(1.0), [(5,), (2, 2)]),
}


def numbers(shapes, dtype):
    """Numbers of few digits, so that one may be added and taken away."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * 32).round().div(32).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_steps(name, dtype):
    step, shapes = STEPS[name]
    before = numbers(shapes, dtype)
    after = step.forward(before)
    for again, x in zip(step.backward(after), before, strict=True):
        assert torch.equal(again, x.to(again.dtype))
        assert again.dtype == dtype or name == "add"
    assert all(map(torch.equal, step.inverse.backward(before), after))
    on_meta = step.forward([x.to("meta") for x in before])
    assert [(x.shape, x.dtype) for x in on_meta] == [(x.shape, x.dtype) for x in after]


def test_what_steps_do():
    a = torch.arange(6)
    assert [part.tolist() for part in Split((1, 2), groups=2).forward([a])] == [[0, 3], [1, 2, 4, 5]]
    assert [part.tolist() for part in Split(3).forward([a])] == [[0, 1], [2, 3], [4, 5]]
    assert Reorder((2, 0, 1)).forward([a])[0].tolist() == [2, 0, 1, 5, 3, 4]
    assert torch.equal(Permute((1, 0)).forward([a.view(2, 3)])[0], a.view(2, 3).mT)
    assert torch.equal(Flatten((3, -1)).inverse.forward([a])[0], a.view(3, 2))
    # 1 + 2^-10 is no bfloat16.
    (total,) = Add(1.0).forward([torch.tensor([2.0**-10], dtype=torch.bfloat16)])
    assert total.item() == 1 + 2.0**-10


def test_views_where_possible():
    whole = torch.randn(6, 1, 4)
    parts = Rule("a", ["b", "c"], Flatten((1, 4), dim=1), Split((2, 4)), Permute((1, 0))).forward([whole])
    assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}


def attention(**options):
    return MIXERS["attention"](24, num_heads=2, head_dim=12, **options)


LATENT = dict(kv_rank=10, value_dim=6)
LATENT_TABLE = dict(head_dim=12, shared_key_dim=4, kv_rank=10)
EXPERTS = dict(num_experts=4, top_k=2, expert_dim=6)
TABLES = {  # a layer of ours, and its table
    "gated_deltanet": lambda: (
        MIXERS["gated_deltanet"](24, num_heads=4, num_key_heads=2, head_dim=6, expand_v=2.0),
        qwen3_next.gated_deltanet_rules(num_heads=4, num_key_heads=2, key_dim=6, value_dim=12, conv_size=4),
    ),
    "gated_attention": lambda: (
        attention(num_kv_heads=1, qk_norm=True, output_gate=True),
        qwen3_next.gated_attention_rules(num_heads=2, head_dim=12),
    ),
    "kda": lambda: (
        MIXERS["kda"](24, num_heads=2, head_dim=12),
        kimi_linear.kda_rules(num_heads=2, head_dim=12, conv_size=4),
    ),
    "kda_saved": lambda: (
        MIXERS["kda"](24, num_heads=2, head_dim=12),
        kimi_linear.kda_rules(num_heads=2, head_dim=12, conv_size=4, saved=True),
    ),
    "kimi_latent": lambda: (
        attention(**LATENT, q_rank=7, rotary_fraction=0.0, shared_key_dim=4),
        kimi_linear.latent_attention_rules(**LATENT_TABLE),
    ),
    "deepseek_latent": lambda: (
        attention(**LATENT, rotary_fraction=1 / 3),
        deepseek_v2.latent_attention_rules(**LATENT_TABLE, full_rank_q=True),
    ),
    "lightning": lambda: (MIXERS["lightning"](24, num_heads=2), minimax.lightning_rules(num_heads=2, head_dim=12)),
    "mamba": lambda: (
        MIXERS["mamba"](24, state_dim=8),
        mamba.mamba_rules(channels=48, state_dim=8, conv_size=4),
    ),
    "mamba2": lambda: (
        MIXERS["mamba2"](24, num_heads=4, state_dim=8, num_groups=2),
        mamba2.mamba2_rules(num_heads=4, head_dim=12, state_dim=8, num_groups=2, conv_size=4),
    ),
    "mixtral": lambda: (MoE(24, **EXPERTS), mixtral.moe_rules()),
    "mixtral_separate": lambda: (MoE(24, **EXPERTS), mixtral.moe_rules(separate_experts=4)),
    "qwen2_moe": lambda: (
        MoE(24, **EXPERTS, shared_expert_dim=8, shared_expert_gate=True),
        qwen2_moe.moe_rules(separate_experts=4),
    ),
    "deepseek_v2": lambda: (MoE(24, **EXPERTS, num_shared_experts=2), deepseek_v2.moe_rules()),
    "deepseek_v3": lambda: (
        MoE(24, **EXPERTS, num_shared_experts=1, balance="loss_free"),
        deepseek_v2.moe_rules(loss_free=True, separate_experts=4),
    ),
    "kimi_moe": lambda: (
        MoE(24, **EXPERTS, num_shared_experts=1, balance="loss_free"),
        kimi_linear.moe_rules(separate_experts=4),
    ),
}


def filled(layer):
    shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    return dict(zip(shapes, numbers(shapes.values(), torch.float32), strict=True))


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    layer, table = TABLES[name]()
    ours = filled(layer)
    theirs = convert(ours, table, reverse=True)
    again = convert(theirs, table)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())
    back = convert(again, table, reverse=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    on_meta = convert({name: tensor.to("meta") for name, tensor in theirs.items()}, table)
    assert {name: tensor.shape for name, tensor in on_meta.items()} == {name: x.shape for name, x in ours.items()}


def test_one_table_for_all_layers():
    table = prefixed(mixtral.moe_rules(separate_experts=2), "model.layers.*.mlp.", "blocks.*.feed_forward.")
    table += prefixed(mixtral.moe_rules(), "dense.", "last.")
    layer = filled(MoE(24, num_experts=2, top_k=1, expert_dim=6))
    ours = {f"blocks.{number}.feed_forward.{name}": x for number in (0, 3, 12) for name, x in layer.items()}
    ours |= {f"last.{name}": x for name, x in layer.items()}
    theirs = convert(ours, table, reverse=True)
    assert "model.layers.12.mlp.experts.1.w2.weight" in theirs
    assert len(theirs) == 3 * 7 + 3
    again = convert(theirs, table)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


def refusal(tensors, *table, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        convert(tensors, table, **options)
    return str(error.value)


A, B = torch.zeros(4, 2), torch.zeros(4, 2)


def test_names_that_do_not_fit():
    join = Rule(["a", "b"], "c", Split(2).inverse)
    assert refusal({"a": A}, join) == "b is missing, which c must be made from: add it or drop its rule."
    assert refusal({}, Rule("a.*.x", "b.*.x")) == (
        "a.*.x is missing for every number *: add the tensors or drop their rule."
    )
    assert refusal({"a.0.x": A, "a.0.y": A, "a.1.x": A}, Rule(["a.*.x", "a.*.y"], "c.*", Split(2).inverse)) == (
        "a.1.y is missing, which c.1 must be made from: add it or drop its rule."
    )
    assert refusal({"a": A, "b": B, "d": A, "e": B}, join) == (
        "No rule takes d and 1 more: add a rule to the table, or leave out what is not wanted."
    )
    twice = (Rule("a", "c"), Rule("b", "c"))
    assert refusal({"a": A, "b": B}, *twice) == "Two rules give c: leave one of them out."
    assert refusal({"c": A}, *twice, reverse=True) == "Two rules take c: leave one of them out."


def test_shapes_that_do_not_fit():
    end = ": check the sizes that the table was made with."
    split = Rule("a", ["b", "c"], Split((3, 1), groups=2))
    assert refusal({"a": A}, split) == f"a must have 8 entries in dim 0 (2 x (3 + 1)), not 4{end}"
    assert refusal({"b": A, "c": B}, split, reverse=True) == f"b must have the shape [6, 2], not [4, 2]{end}"
    narrow = {"b": torch.zeros(6, 2), "c": torch.zeros(2, 3)}
    assert refusal(narrow, split, reverse=True) == f"c must have the shape [2, 2], not [2, 3]{end}"
    assert refusal({"a": A}, Rule("a", list("bcd"), Split(3))) == (
        f"a must have a multiple of 3 entries in dim 0, not 4{end}"
    )
    assert refusal({"a": A, "b": torch.zeros(2, 2)}, Rule(["a", "b"], "c", Split(2).inverse)) == (
        f"b must have the shape [4, 2], not [2, 2]{end}"
    )
    flatten = Rule("a", "b", Flatten((1, -1), dim=1))
    assert refusal({"a": A}, flatten) == f"a must have dims 1 to 2 of sizes 1, any, not the shape [4, 2]{end}"
    assert refusal({"a": A}, Rule("a", "b", Flatten((2, 4)).inverse)) == f"a must have 8 entries in dim 0, not 4{end}"
    assert refusal({"a": A}, Rule("a", "b", Flatten((3, -1)).inverse)) == (
        f"a must have a multiple of 3 entries in dim 0, not 4{end}"
    )
    assert refusal({"a": A}, Rule("a", "b", Reorder((2, 0, 1)))) == (
        f"a must have a multiple of 3 entries in dim 0, not 4{end}"
    )
    assert refusal({"a": A}, Rule("a", "b", Permute((1, 0, 2)))) == f"a must have 3 dims, not the shape [4, 2]{end}"
    assert (
        refusal({"a": torch.zeros(())}, Rule("a", "b", Reorder((0,)))) == f"a must have a dim 0, not the shape []{end}"
    )
    # The tensor is named that the wrong one in the middle of the steps came from.
    joined = Rule(["a", "b"], "c", Flatten((1, 4)), Split(2).inverse)
    assert refusal({"a": torch.zeros(1, 4), "b": torch.zeros(2, 4)}, joined) == (
        f"b must have dims 0 to 1 of sizes 1, 4, not the shape [2, 4]{end}"
    )


def test_joined_tensors_have_one_dtype():
    join = Rule(["a", "b"], "c", Split(2).inverse)
    assert refusal({"a": A, "b": B.bfloat16()}, join) == (
        "b must be torch.float32 on cpu, like the tensor it is joined with, not torch.bfloat16 on cpu: convert it "
        "first."
    )


def test_rules_that_cannot_be():
    with pytest.raises(ValueError, match=r"^Rule\(a -> b\): the steps give 2 tensors, not 1\.$"):
        Rule("a", "b", Split(2))
    with pytest.raises(ValueError, match=r"^Rule\(a, b -> c\): Split\(.*\) takes 1 tensors, not 2\.$"):
        Rule(["a", "b"], "c", Split(2))
    with pytest.raises(ValueError, match=r"^Rule\(a\.\* -> b\): each name must have one \*, or none of them any\.$"):
        Rule("a.*", "b")
    with pytest.raises(ValueError, match=r"holds 0: groups and sizes must be at least 1\.$"):
        Split((4, 0))
    with pytest.raises(ValueError, match=r"^\(0, 2\) must hold each number from 0 to 1 once\.$"):
        Reorder((0, 2))
