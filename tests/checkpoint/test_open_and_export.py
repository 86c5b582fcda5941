"""Opening a checkpoint or an exported folder; and back again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.conftest import LOSS_FREE, arguments, train
from torchlmoe import export, import_model
from torchlmoe.checkpoint import open_model
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

LAST = "checkpoints/step-00000008"


def test_open_gives_the_trained_model(single, corpus, process_group):
    trainer = Trainer(load_config(arguments(corpus, single, LOSS_FREE)))
    for folder in (single, single / "checkpoints", single / LAST):
        model, config, tokenizer = open_model(folder)
        torch.testing.assert_close(model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)
    assert not model.training
    assert config.model.dim == 32
    assert config.moe.balance == "loss_free"
    assert tokenizer.vocab_size == model.embedding.num_embeddings
    tokens = torch.arange(64).view(2, 32)
    torch.testing.assert_close(model(tokens), trainer.model.eval()(tokens), rtol=0, atol=0)


def test_open_in_another_dtype_keeps_the_islands(single):
    model, _, _ = open_model(single, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes["embedding.weight"] == torch.bfloat16
    islands = [name for name, module in model.named_modules() if getattr(module, "float32_island", False)]
    assert len(islands) == 3
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if name.startswith(tuple(islands)) else torch.bfloat16), name
    assert model(torch.arange(8).view(1, 8)).isfinite().all()


def test_open_says_what_is_missing(single, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint: give"):
        open_model(tmp_path)
    export.main(["--checkpoint", str(single), "--output", str(tmp_path / "model")])
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["settings"]["model"]["dim"] = 64
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json has .* bytes in place of"):
        open_model(tmp_path / "model")
    (tmp_path / "model/manifest.json").unlink()
    with pytest.raises(ValueError, match="but the settings give"):
        open_model(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "llamba"}')
    with pytest.raises(ValueError, match="model_type = 'llamba', which cannot be imported; supported are bamba, "):
        open_model(tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "settings": {}}))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        open_model(tmp_path / "model")
    for text, sentence in {
        "[]": r"config.json cannot be used: its content = \[\] is not valid: it should be an object;",
        json.dumps({**config, "settings": []}): r"settings = \[\] is not valid: it should be an object",
        json.dumps({**config, "vocab_size": "many"}): "vocab_size = 'many' is not valid: it should be a valid integer",
        json.dumps({**config, "vocab_size": -3}): "vocab_size = -3 is not valid: it should be greater than or equal",
    }.items():
        (tmp_path / "model/config.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            open_model(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "torchlmoe"}')
    with pytest.raises(ValueError, match="settings is missing; export the model again"):
        open_model(tmp_path / "model")
    with pytest.raises(ValueError, match="exists already"):
        export.main(["--checkpoint", str(single), "--output", str(tmp_path / "model")])


def test_export_and_back(single, corpus, tmp_path, process_group):
    export.main(["--checkpoint", str(single), "--output", str(tmp_path / "model"), "--max-shard-gib", "0.0006"])
    weights: dict = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        weights |= load_file(file)
    original, _, tokenizer = open_model(single)
    torch.testing.assert_close(weights, dict(original.state_dict()), rtol=0, atol=0)

    import_model.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")])
    for folder in (tmp_path / "model", tmp_path / "run"):
        model, config, same_tokenizer = open_model(folder)
        torch.testing.assert_close(model.state_dict(), original.state_dict(), rtol=0, atol=0)
        assert same_tokenizer.fingerprint == tokenizer.fingerprint
        assert config.moe.score_function == "sigmoid"
    with pytest.raises(ValueError, match="holds checkpoints already"):
        import_model.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")])

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"The checkpoint could not be written to .*file/checkpoints: Not a directory;"):
        import_model.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "file")])

    # A run starts from it, at its first step and with a fresh optimizer, whatever its seed or batch.
    extra = f"{LOSS_FREE} --training.seed 3 --training.seq_len 16 --training.global_batch_size 2"
    trainer = Trainer(load_config(arguments(corpus, tmp_path / "run", extra)))
    assert trainer.progress.step == 0
    assert not trainer.optimizer.state
    torch.testing.assert_close(trainer.model.state_dict(), original.state_dict(), rtol=0, atol=0)
    trainer.loader.close()
    trained = train(corpus, tmp_path / "run", extra)
    assert [record["step"] for record in trained.log.records] == list(range(1, 9))
