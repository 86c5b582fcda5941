"""Every kind of bad input to train.py: one sentence on standard error, exit code 2, no traceback, nothing lost."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from filelock import FileLock

import train
from tests.programs import run_program
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

SMALL = """--model.dim 32 --model.num_layers 2 --model.layer_pattern LN --model.num_heads 2 --moe.num_experts 4
--moe.top_k 2 --moe.expert_dim 16 --training.seq_len 32 --training.local_batch_size 2 --training.device cpu
--training.steps 2 --metrics.tensorboard false --metrics.plot false --checkpoint.enable true"""


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory) -> Iterator[Path]:
    """A folder with a finished run, prepared data, and files that are not what they should be."""
    place = tmp_path_factory.mktemp("bad")
    for split in ("train", "validation"):
        shutil.copy(corpus / f"{split}.jsonl", place)
    arguments = f"{SMALL} --data.dataset {place} --data.cache_dir {place}/cache --job.dump_folder {place}/run"
    Trainer(load_config(arguments.split())).train()
    dist.destroy_process_group()
    (place / "not.toml").write_text("steps = = 3")
    (place / "debug.toml").write_text("[job]\ndebug = true")
    (place / "empty").mkdir()
    (place / "empty.jsonl").write_text('{"text": ""}\n')
    (place / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 50)
    (place / "broken.jsonl").write_text('{"text": "whole"}\n{"text": \n')
    (place / "numbers.jsonl").write_text('{"text": 3}\n')
    (place / "other.jsonl").write_text('{"content": "text"}\n')
    (place / "fake.parquet").write_bytes(b"PAR1 nothing")
    pq.write_table(pa.table({"text": ["whole"] * 9}), place / "torn.parquet")
    with (place / "torn.parquet").open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 20)
    (place / "book.txt").write_text("Call me Ishmael. " * 99)
    np.arange(5, dtype="<u2").tofile(place / "mismatch.bin")
    index = struct.pack("<9sQBQQiqqq", b"MMIDIDX\x00\x00", 1, 8, 1, 2, 4, 0, 0, 1)
    (place / "mismatch.idx").write_bytes(index)
    (place / "tokenizer.json").write_text("{}")
    (place / "file").write_text("")
    damaged = shutil.copytree(place / "run", place / "damaged") / "checkpoints" / "step-00000002"
    with next(damaged.glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    shutil.copytree(place / "cache", place / "wrong_ids")
    for index in (place / "wrong_ids").glob("bad*-train-*/index.json"):
        tokens = index.parent / "tokens_00000.bin"
        values = np.fromfile(tokens, "<u2")
        values[:] = 5000
        values.tofile(tokens)
    shutil.copytree(place / "cache", place / "cut_tokens")
    for tokens in (place / "cut_tokens").glob("bad*-train-*/tokens_00000.bin"):
        os.truncate(tokens, 100)
    (place / "no_folder").mkdir()
    (place / "no_folder" / "checkpoints").touch()
    (place / "busy").mkdir()
    with FileLock(place / "busy" / ".lock"):  # as a running run holds it
        yield place


CASES = {
    "--training.stepps 3": "training.stepps is not a setting; the nearest is steps.",
    "--trainig.steps 3": "[trainig] is not a table of settings; the nearest is training.",
    "--training.steps many": "training.steps = 'many' is not valid: it should be a valid integer.",
    "--training.steps -1": "training.steps = -1 is not valid: it should be greater than or equal to 1.",
    "--training.dtype float16": "training.dtype = 'float16' is not valid",
    "steps 3": "'steps' is not a setting; write --table.key value",
    "--training.steps": "--training.steps needs a value.",
    "--job.config_file {place}/nowhere.toml": "nowhere.toml' does not exist; see train_configs/ for recipes.",
    "--job.config_file {place}/not.toml": "not.toml is not TOML",
    "--data.dataset {place}/nowhere.jsonl": 'nowhere.jsonl" does not exist',
    "--data.dataset {place}/empty": "empty",
    "--data.dataset {place}/empty.jsonl": "has no documents with text",
    "--data.dataset {place}/binary.txt": "binary.txt cannot be read",
    "--data.dataset {place}/broken.jsonl": "broken.jsonl cannot be read",
    "--data.dataset {place}/numbers.jsonl": "Column 'text' of {place}/numbers.jsonl, line 1 holds int, not text",
    "--data.dataset {place}/other.jsonl": "other.jsonl, line 1 has no column 'text': set data.text_column to one",
    "--data.dataset {place}/fake.parquet": "fake.parquet cannot be read",
    "--data.dataset {place}/torn.parquet": "torn.parquet cannot be read",
    "--data.dataset {place}/book.txt": "give a data.validation_dataset, set validation.enable = false, or",
    "--data.dataset {place}/mismatch.bin --validation.enable false": "mismatch.idx does not match mismatch.bin: it",
    "--data.num_writers 2 --data.writer 2": "data.writer = 2 must be less than data.num_writers = 2",
    "--data.mixture [{{dataset='a',weight=-1.0}}]": "data.mixture.0.weight = -1.0 is not valid",
    "--data.mixture [{{dataset='a',weight=0.0}}]": "data.mixture has only sources with weight = 0: give at least one",
    "--data.tokenizer {place}/nowhere": 'does not exist: give "embedded", a tokenizer.json or a folder.',
    "--data.tokenizer {place}/tokenizer.json": "tokenizer.json is not a tokenizer.json that this version",
    "--data.end_token <|nothing|>": "has no end token <|nothing|>",
    "--data.cache_dir {place}/wrong_ids": "holds token 5000, beyond the vocabulary of 4096",
    "--data.cache_dir {place}/cut_tokens": "has 100 bytes in place of the",
    "--training.seq_len 1000000": "training.seq_len = 1000000 is longer than the training data",
    "--training.global_batch_size 3": "training.global_batch_size = 3 must be a multiple of",
    "--moe.num_experts 0": "moe.num_experts = 0 is not valid",
    "--moe.top_k 9": "top_k = 9 must lie between 1 and the 4 experts",
    # Found before data is looked for.
    "--model.num_heads 3 --data.dataset {place}/nowhere": "dim = 32 cannot be split into num_heads = 3 heads",
    "--moe.expert_dim 1000000000000000000": "There is not enough memory (Storage size calculation overflowed",
    "--moe.num_experts 9999999999999999999": "There is not enough memory (",
    "--moe.expert_dim 100000000000": "There is not enough memory (",
    "--model.mixer gated_deltanett": "= 'gated_deltanett' is unknown; the nearest is gated_deltanet.",
    "--model.layer_pattern LX": "model.layer_pattern = 'LX' names 'X', which has no table",
    "--model.mixer bla --model.layers.L.conv_size 4": "model.layers.L.conv_size is not a setting",
    "--model.vocab_size 100": "model.vocab_size = 100 is less than the 4096 tokens",
    "--model.backend triton --training.dtype float64": "backend = 'triton' is not available here, since its kernels",
    "--parallelism.data_parallel_shard_degree 3": "there are 1 ranks; their product must be the number of ranks",
    "--parallelism.pipeline_parallel_degree 2": "pipeline_parallel_degree = 2 does not divide the 1 ranks; choose",
    "--parallelism.context_parallel_degree 2": "context_parallel_degree = 2 does not divide the 1 ranks; choose",
    "--parallelism.lsm_context_parallel ring": "lsm_context_parallel = 'ring' has no effect with",
    "--lr_scheduler.warmup_steps 30": "lr_scheduler.warmup_steps = 30 is more than training.steps = 2",
    "--training.device cuda": "training.device = 'cuda' needs a GPU",
    "--job.dump_folder {place}/file/run": "{place}/file/run: Not a directory.",
    "--job.dump_folder {place}/no_folder": "could not be written to {place}/no_folder/checkpoints: File exists;",
    "--job.dump_folder {place}/busy": "Another run writes to {place}/busy: wait until it ends",
    "--checkpoint.load_step 7 --job.dump_folder {place}/run": "checkpoint.load_step = 7 is not in {place}/run",
    "--checkpoint.load_step 2 --checkpoint.enable false": "checkpoint.load_step = 2 has no effect",
    "--job.dump_folder {place}/damaged": "is damaged: its content does not have the checksum that was written",
    "--job.dump_folder {place}/run --model.dim 64": "model.dim",
    "--job.dump_folder {place}/run --model.vocab_size 5000": "vocab_size",
    "--optimizer.lr 100 --training.max_norm 1e9 --training.steps 9": "lower optimizer.lr",
}


def all_arguments(case: str, place: Path, tmp_path: Path) -> list[str]:
    given = [f"--data.dataset {place}", f"--data.cache_dir {place}/cache", f"--job.dump_folder {tmp_path}/new"]
    # Of a setting given twice the last one counts.
    return f"{SMALL} {' '.join(given)} {case.format(place=place)}".split()


@pytest.mark.parametrize(("case", "sentence"), CASES.items())
def test_one_sentence_and_exit_code_2(case, sentence, place, tmp_path):
    result = run_program(train.main, all_arguments(case, place, tmp_path), tmp_path)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence.format(place=place) in last
    assert last.endswith(".")
    assert "Traceback" not in result.stderr
    saved = place / "run" / "checkpoints" / "step-00000002" / "manifest.json"
    assert json.loads(saved.read_text())["files"]


@pytest.mark.parametrize("bad", ["--moe.top_k 9", "--moe.top_k 0"])  # found by the model, and by the settings
@pytest.mark.parametrize(
    ("debug", "shown"),
    {
        "--job.debug": True,
        "--job.debug true": True,
        "--job.debug=true": True,
        "--job.config_file {place}/debug.toml": True,
        "--job.config_file {place}/debug.toml --job.debug false": False,
        "--job.debug true --job.debug=false": False,
    }.items(),
)
def test_debug_shows_the_traceback_before_the_sentence(debug, shown, bad, place, tmp_path):
    result = run_program(train.main, all_arguments(f"{bad} {debug}", place, tmp_path), tmp_path)
    assert result.returncode == 2
    assert ("Traceback" in result.stderr) == shown
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "top_k = " in last
