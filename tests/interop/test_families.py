"""Models of transformers, imported and exported: the same logits, gradients and tensors, in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.interop.families import CASES, all_in_float64, loaded_by_transformers, near, tensors_of, their_model
from torchlmoe import export, import_model
from torchlmoe.checkpoint import open_model
from torchlmoe.interop.families import FAMILIES
from torchlmoe.interop.rules import convert

TOKENS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
BOUNDS = torch.tensor([[0, 7, 24], [0, 1, 24]], dtype=torch.int32)


def their_loss(model):
    logits = model(TOKENS, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")


def our_loss(model):
    labels = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -100)], 1)
    return model(TOKENS, None, labels)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    model_type, options = CASES[name]
    theirs = their_model(model_type, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    import_model.main(["--model", str(tmp_path / "theirs"), "--output", str(tmp_path / "run")])
    ours, _, _ = open_model(tmp_path / "run")
    assert ours.embedding.weight.dtype == torch.float64

    with torch.no_grad():
        logits, packed = ours(TOKENS), ours(TOKENS, BOUNDS)
        assert torch.equal(open_model(tmp_path / "theirs")[0](TOKENS), logits)
        with all_in_float64():
            near(logits, theirs(TOKENS, use_cache=False).logits)
            for row, bounds in enumerate(BOUNDS.tolist()):
                for start, end in zip(bounds, bounds[1:], strict=False):
                    alone = theirs(TOKENS[row : row + 1, start:end], use_cache=False).logits
                    near(packed[row : row + 1, start:end], alone)

    with all_in_float64():
        their_loss(theirs).backward()
    our_loss(ours).backward()
    of_theirs = {
        n: torch.zeros_like(b) for n, b in theirs.state_dict().items() if n.endswith("e_score_correction_bias")
    }
    of_theirs |= {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in theirs.named_parameters()}
    expected = convert(of_theirs, FAMILIES[model_type].rules(ours, separate_experts=False))
    for parameter_name, parameter in ours.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        near(grad, expected[parameter_name])

    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "again"), "--format", model_type])
    with torch.no_grad(), all_in_float64():
        again = loaded_by_transformers(tmp_path / "again")
        near(again(TOKENS, use_cache=False).logits, logits)
    saved, written = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "again")
    assert saved.keys() == written.keys()
    assert all(torch.equal(tensor, written[tensor_name]) for tensor_name, tensor in saved.items())
