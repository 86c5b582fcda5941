"""A small hybrid with the embedded tokenizer, and the same model as an exported folder."""

import pytest

from torchlmoe.checkpoint.exported import write_exported
from torchlmoe.config.load import load_config
from torchlmoe.data.tokenizer import load_tokenizer
from torchlmoe.model.decoder import build_on_meta

SMALL = """--model.dim 32 --model.num_layers 2 --model.layer_pattern LN --model.num_heads 2 --model.init_std 0.3
--moe.num_experts 4 --moe.top_k 2 --moe.expert_dim 16 --training.seq_len 64 --training.dtype float64
--model.embedding_multiplier 3 --model.logit_divisor 2""".split()


@pytest.fixture(scope="package")
def tokenizer():
    return load_tokenizer("embedded")


def build(tokenizer, *arguments):
    config = load_config([*SMALL, *arguments])
    model = build_on_meta(config, tokenizer.vocab_size).double().to_empty(device="cpu")
    model.init_weights(seed=0)
    return config, model.eval()


@pytest.fixture(scope="package")
def model(tokenizer):
    return build(tokenizer)[1]


@pytest.fixture(scope="package")
def folder(tokenizer, tmp_path_factory):
    config, model = build(tokenizer)
    folder = tmp_path_factory.mktemp("model") / "exported"
    write_exported(folder, model, config, tokenizer, max_shard_bytes=1 << 30)
    return folder
