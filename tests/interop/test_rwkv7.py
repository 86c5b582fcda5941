"""RWKV-7 of flash-linear-attention against a loop over tokens in float64, written on its own tensors."""

import pytest
import torch
import torch.nn.functional as F

from tests.interop.test_fla import WRITTEN, folder_of
from tests.interop.test_hybrids import check_export
from torchlmoe import import_model
from torchlmoe.checkpoint import open_model
from torchlmoe.inference.cache import new_cache, read
from torchlmoe.inference.generate import generate
from torchlmoe.interop.families import FAMILIES
from torchlmoe.interop.rules import convert

BOUNDS = [0, 1, 9, 9, 40]


def layer_norm(x, w, name, eps):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
    return y + w.get(f"{name}.bias", 0)


def logits_of_a_document(w, config, tokens):
    """arXiv 2503.14456, one token after the other: tokens [T] -> [T, vocabulary]. w: tensors by their names."""
    heads, eps = config["num_heads"], config["norm_eps"]
    layers = range(config["num_hidden_layers"])
    state = [0.0 for _ in layers]  # [heads, value, key]
    last = {(part, layer): 0.0 for part in ("attn", "ffn") for layer in layers}
    logits = []
    for token in tokens:
        x = w["model.embeddings.weight"][token]
        if config["norm_first"]:
            x = layer_norm(x, w, "model.layers.0.pre_norm", eps)
        for layer in layers:
            name = f"model.layers.{layer}.attn"
            given = layer_norm(x, w, f"{name}_norm", eps)
            before, last["attn", layer] = last["attn", layer], given
            mixed = {p: given + (before - given) * w[f"{name}.x_{p}"].flatten() for p in "rwkvag"}

            def lora(p, activation, name=name, mixed=mixed):
                hidden = activation(w[f"{name}.{p}_lora.lora.0.weight"] @ mixed[p])
                return w[f"{name}.{p}_lora.lora.2.weight"] @ hidden + w.get(f"{name}.{p}_lora.lora.2.bias", 0)

            r, k, v = (w[f"{name}.{p}_proj.weight"] @ mixed[p] for p in "rkv")
            if layer == 0:
                first = v
            else:
                v = v + (first - v) * lora("v", lambda z: z).sigmoid()
            decay = (-(torch.tensor(-0.5, dtype=torch.float64).exp()) * lora("w", torch.tanh).sigmoid()).exp()
            rate = lora("a", lambda z: z).sigmoid()
            key = (k * w[f"{name}.k_k"]).view(heads, -1)
            key = key / key.norm(dim=-1, keepdim=True)
            k = k * (1 + (rate - 1) * w[f"{name}.k_a"])
            r, k, v, decay, rate = (z.view(heads, -1) for z in (r, k, v, decay, rate))
            if isinstance(state[layer], float):
                state[layer] = v.new_zeros(heads, v.shape[1], k.shape[1])
            read_out = state[layer] @ -key[..., None]
            written = read_out * (key * rate)[:, None] + v[..., None] * k[:, None]
            state[layer] = state[layer] * decay[:, None] + written
            o = (state[layer] @ r[..., None])[..., 0]
            o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + o.shape[1] * eps).sqrt()
            o = o.flatten() * w[f"{name}.g_norm.weight"] + w[f"{name}.g_norm.bias"]
            o = o + ((r * k * w[f"{name}.r_k"]).sum(-1, keepdim=True) * v).flatten()
            x = x + w[f"{name}.o_proj.weight"] @ (o * lora("g", torch.sigmoid))

            name = f"model.layers.{layer}.ffn"
            given = layer_norm(x, w, f"{name}_norm", eps)
            before, last["ffn", layer] = last["ffn", layer], given
            hidden = w[f"{name}.key.weight"] @ (given + (before - given) * w[f"{name}.x_k"])
            x = x + w[f"{name}.value.weight"] @ hidden.relu().square()
        head = w["model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
        logits.append(head @ layer_norm(x, w, "model.norm", eps))
    return torch.stack(logits)


@pytest.mark.parametrize("name", ["rwkv7", "rwkv7_unfused"])
def test_equals_a_loop_over_tokens(name, tmp_path):
    """Logits and gradients, packed and in pieces from the cache; greedy tokens of ragged prompts."""
    folder, config = folder_of(name, tmp_path / "theirs"), WRITTEN["models"][name]["config"]
    import_model.main(["--model", str(folder), "--output", str(tmp_path / "run")])
    ours = open_model(tmp_path / "run")[0].double()
    rules = FAMILIES["rwkv7"].rules(ours)
    theirs = convert({n: p.detach().clone() for n, p in ours.named_parameters()}, rules, reverse=True)
    theirs = {n: tensor.requires_grad_() for n, tensor in theirs.items()}
    tokens = torch.randint(16, (BOUNDS[-1],), generator=torch.Generator().manual_seed(0))
    documents = tokens.split(torch.tensor(BOUNDS).diff().tolist())
    expected = torch.cat([logits_of_a_document(theirs, config, d.tolist()) for d in documents if len(d)])
    found = ours(tokens[None], torch.tensor([BOUNDS], dtype=torch.int32))[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    for logits in (found, expected):
        F.cross_entropy(logits, tokens.roll(-1), reduction="sum").backward()
    gradients = convert({n: p.grad for n, p in ours.named_parameters()}, rules, reverse=True)
    assert gradients.keys() == theirs.keys()
    for n, tensor in theirs.items():
        assert tensor.grad.norm() > 1e-3, n
        assert (gradients[n] - tensor.grad).norm() <= 1e-6 * tensor.grad.norm(), n

    with torch.no_grad():
        last = documents[-1]
        cache, logits = new_cache(ours, 1, len(last)), []
        for piece in last.split([5, 1, 1, 13, 11]):
            logits.append(read(ours, cache, piece[None])[0])
        torch.testing.assert_close(torch.stack(logits), expected[9:][[4, 5, 6, 19, 30]], rtol=1e-9, atol=1e-9)
        prompts = [tokens[:7].tolist(), [3], tokens[:20].tolist()]
        for prompt, more in zip(prompts, generate(ours, prompts, max_new_tokens=24), strict=True):
            whole = logits_of_a_document(theirs, config, [*prompt, *more])
            assert whole[len(prompt) - 1 : -1].argmax(-1).tolist() == more


def settings(**keys):
    """Of the model "rwkv7", with other keys; one whose value is `...` is left out."""
    content = WRITTEN["models"]["rwkv7"]["config"] | keys
    return FAMILIES["rwkv7"].settings({key: value for key, value in content.items() if value is not ...}, "config.json")


def test_keys_that_are_absent_or_null():
    """As RWKV7Config and RWKV7Attention of fla read them: a rank that is null grows with the widths."""
    layer = settings(hidden_size=1024, value_dim=None, num_heads=None, head_dim=..., intermediate_size=None)
    layer = layer["model"]["layers"]["L"]
    assert (layer["num_heads"], layer["mlp_options"]["mlp_dim"]) == (16, 4096)
    ranks = dict.fromkeys(("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim"))
    wide = settings(hidden_size=1024, value_dim=1024, num_heads=8, head_dim=None, hidden_ratio=3.3, **ranks)
    del wide["model"]["layers"]["L"]["mlp_options"]
    assert wide["model"]["layers"]["L"] == {
        "mixer": "rwkv7", "num_heads": 8, "decay_rank": 160, "rate_rank": 160, "value_rank": 96, "gate_rank": 160,
        "head_norm_eps": 1e-5, "mlp": "dense", "mlp_token_shift": True,
    }  # fmt: skip
    options = settings(intermediate_size=..., hidden_ratio=2.1)["model"]["layers"]["L"]["mlp_options"]
    assert options == {"mlp_dim": 96, "activation": "relu2"}  # of 67.2, up to a multiple of 32
    absent = settings(**dict.fromkeys(ranks, ...), norm_first=..., norm_bias=..., norm_eps=...)
    assert absent == settings() == settings(num_heads=2)
    for keys, sentence in (
        (dict(head_dim=12), "config.json has head_dim = 12, which must divide hidden_size = 32."),
        (dict(head_dim=None, num_heads=5), "config.json has num_heads = 5, which must divide hidden_size = 32."),
        (dict(head_dim=None, num_heads=None), "config.json has no num_heads: it must say this."),
    ):
        with pytest.raises(ValueError, match=r"\.$") as caught:
            settings(**keys)
        assert str(caught.value) == sentence


LACKING = [
    ({"norm": "rms"}, {}, "embedding_norm is RMSNorm"),
    ({"norm_eps": 1e-4}, {}, "mixer.norm.eps is 8e-05"),
    ({"embedding_multiplier": 2.0}, {}, "model.embedding_multiplier is 2.0"),
    ({}, {"mlp_token_shift": False}, "residual is Residual("),
    ({}, {"mlp": "moe", "mlp_options": {}}, "no feed-forward layer of class Dense"),
    ({}, {"mlp_options": {"mlp_dim": 24}}, "feed_forward.gate_proj"),
    ({}, {"mixer": "rwkv6"}, "Block 0 has the mixer rwkv6; rwkv7 has only rwkv7"),
    ({"layer_pattern": "LF"}, {}, "blocks.1.mixer"),
    ({}, {"head_dim": 16}, "A mixer is 64 channels wide, which rwkv7 needs to be dim = 32"),
]


@pytest.mark.parametrize(("model", "layer", "message"), LACKING)
def test_options_without_a_counterpart_there(model, layer, message):
    tables = settings()
    check_export("rwkv7", tables)
    whole = tables["model"]["layers"]["L"]
    kept = {"mixer": "rwkv6", "num_heads": 4} if "mixer" in layer else whole
    alone = {name: value for name, value in whole.items() if name.startswith("mlp")} | {"mixer": "none"}
    tables["model"] |= {"layers": {"L": kept | layer, "F": alone}} | model
    with pytest.raises(ValueError, match=r"choose another --format\.$") as refusal:
        check_export("rwkv7", tables)
    assert message in str(refusal.value)


@pytest.mark.parametrize("options", [{"embedding_norm": True}, {"norm": "layer"}])
def test_other_families_refuse_these_norms(options):
    tables = FAMILIES["gla"].settings(WRITTEN["models"]["gla"]["config"], "config.json")
    check_export("gla", tables)
    tables["model"] |= options
    with pytest.raises(ValueError, match=r"norm is .*, for which gla has no counterpart"):
        check_export("gla", tables)
