"""A resumed run, bit for bit; settings that may change and settings that may not."""

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.checkpoint.conftest import GLOBAL_BATCH, LOSS_FREE, arguments, records, stopped_at_step, train
from torchlmoe.checkpoint.folders import published
from torchlmoe.checkpoint.writer import CheckpointWriter
from torchlmoe.config.load import load_config
from torchlmoe.training import validation
from torchlmoe.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_same_ranks_resume_bit_for_bit(async_mode, corpus, tmp_path, monkeypatch, caplog):
    write_data = CheckpointWriter.write_data

    def slowly(*arguments):
        time.sleep(0.3)  # in the background, while steps continue
        return write_data(*arguments)

    monkeypatch.setattr(CheckpointWriter, "write_data", slowly)
    extra = f"{GLOBAL_BATCH} --checkpoint.async_mode {async_mode} --metrics.tensorboard true --metrics.plot true"
    train(corpus, tmp_path / "whole", extra)
    folder = stopped_at_step(4, tmp_path / "whole", tmp_path / "again")
    metrics = folder / "metrics.jsonl"
    # Lines that are no records, and the row that was being written when the run was killed.
    metrics.write_text('3\n{"loss": 1}\n{"step": "2"}\n' + metrics.read_text() + '{"step": 9, "los')
    trainer = train(corpus, folder, extra)
    assert f"Ignored: line 3 of {metrics} is not a record of a step." in caplog.messages
    assert trainer.checkpointer.saved_step == 8
    assert records(folder) == records(tmp_path / "whole")
    assert len(trainer.log.records) == 8  # of which the picture is drawn
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    first, second = (
        load_file(path / "checkpoints/step-00000008/shard-00001-model-00001-of-00001.safetensors")
        for path in (folder, tmp_path / "whole")
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_checkpoints_come_and_go(corpus, tmp_path):
    extra = "--checkpoint.interval 1 --checkpoint.keep_latest_k 3"
    train(corpus, tmp_path, extra)
    root = tmp_path / "checkpoints"
    assert list(published(root)) == [6, 7, 8]
    assert len(list(root.iterdir())) == 3
    (root / "step-00000009.partial").mkdir()
    (root / "step-00000003.removing").mkdir()
    trainer = train(corpus, tmp_path, f"{extra} --checkpoint.load_step 6")
    assert [record["step"] for record in trainer.log.records] == list(range(1, 9))
    names = {path.name for path in root.iterdir()}
    assert names == {f"step-0000000{n}" for n in (6, 7, 8)} | {f"step-0000000{n}.abandoned" for n in (7, 8)}
    assert "load_step" not in (tmp_path / "config.toml").read_text()
    for same in (extra, f"{extra} --checkpoint.load_step 6"):  # the same command once more finds all done
        assert train(corpus, tmp_path, same).progress.step == 8
        assert len(records(tmp_path)) == 8
        assert {path.name for path in root.iterdir()} == names
    first = {name: (root / name / "manifest.json").read_bytes() for name in names if "abandoned" in name}
    train(corpus, tmp_path, f"{extra} --checkpoint.load_step 7 --optimizer.lr 1e-2")
    assert {path.name for path in root.iterdir()} == names | {"step-00000008.abandoned-2"}
    assert first == {name: (root / name / "manifest.json").read_bytes() for name in first}
    (root / "step-00000008/run.json").write_text("")
    with pytest.raises(ValueError, match=r"run\.json has 0 bytes"):
        train(corpus, tmp_path, extra)
    with pytest.raises(ValueError, match=r"checkpoint.load_step = 5 is not in .*; there are: 6, 7, 8\."):
        train(corpus, tmp_path, "--checkpoint.load_step 5")


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise RuntimeError("the machine is gone")


@pytest.mark.parametrize("step", [3, 8])
@pytest.mark.parametrize("end", [ask_to_stop, fail])
def test_a_validation_that_was_cut_off_is_made_up_for(end, step, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "BATCHES_BETWEEN_CHECKS", 1)
    extra = f"{GLOBAL_BATCH} --validation.enable true --validation.interval 3"
    train(corpus, tmp_path / "whole", extra)
    folder = tmp_path / "cut"
    trainer = Trainer(load_config(arguments(corpus, folder, extra)))
    batches = []

    def hook(model, *_):
        if not model.training and trainer.progress.step == step:
            batches.append(1)
            end()

    trainer.model.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="is gone") if end is fail else nullcontext():
        trainer.train()
    assert len(batches) == 1
    assert records(folder) == records(tmp_path / "whole")[: step - 1]
    assert max(published(folder / "checkpoints"), default=0) == (0 if end is fail and step == 3 else step)
    assert not (folder / "finished").exists()
    train(corpus, folder, extra)
    assert records(folder) == records(tmp_path / "whole")
    assert (folder / "finished").exists()


CHANGED = {
    "--model.dim 64": "model.dim is 64, but the run that saved",
    "--model.layers.L.mixer gla": "model.layers.L.mixer is 'gla'",
    "--model.layers.L.conv_size 3": "model.layers.L.conv_size is 3",
    "--model.layer_pattern L": "model.layer_pattern is 'LL'",
    "--model.vocab_size 5000": "model.vocab_size is 5000",
    "--moe.num_experts 8": "moe.num_experts is 8",
    "--moe.balance none --moe.bias_update_rate 1e-3": "moe.balance is 'none'",
    "--training.dtype float32": "training.dtype is 'float32 or bfloat16'",
    "--training.seed 1": "training.seed is 1",
    "--training.global_batch_size 8": "training.global_batch_size is 8",
}


def test_another_model_or_order_of_data_is_refused(single, corpus, tmp_path):
    folder = shutil.copytree(single, tmp_path / "run")
    for extra, sentence in CHANGED.items():
        with pytest.raises(ValueError, match=r"start a new run in another job\.dump_folder") as error:
            Trainer(load_config(arguments(corpus, folder, f"{LOSS_FREE} {extra}")))
        assert sentence in str(error.value)
    more = shutil.copytree(corpus, tmp_path / "more", ignore=shutil.ignore_patterns("cache"))
    with (more / "train.jsonl").open("a") as file:
        file.write('{"text": "One more."}\n')
    for extra in (f"--data.dataset {more}", "--data.max_tokens 2000"):
        with pytest.raises(ValueError, match=r"data\.num_tokens is .*: give the same training data"):
            Trainer(load_config(arguments(corpus, folder, f"{LOSS_FREE} {extra}")))
    texts = (more / "train.jsonl").read_text().splitlines()[:-1]
    (more / "train.jsonl").write_text("\n".join([*texts[1:], texts[0]]) + "\n")  # as a renamed file changes the order
    with pytest.raises(ValueError, match=r"data\.content is .*: give the same training data"):
        Trainer(load_config(arguments(corpus, folder, f"{LOSS_FREE} --data.dataset {more}")))
    tokenizer = json.loads((single / "checkpoints/step-00000008/tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    with pytest.raises(ValueError, match=r"data\.tokenizer is .sha256"):
        Trainer(load_config(arguments(corpus, folder, f"{LOSS_FREE} --data.tokenizer {tmp_path}")))
    assert (folder / "metrics.jsonl").read_bytes() == (single / "metrics.jsonl").read_bytes()


def test_what_may_change(single, corpus, tmp_path):
    folder = stopped_at_step(4, single, tmp_path / "run")
    extra = "--training.steps 6 --optimizer.lr 1e-4 --training.local_batch_size 2 --model.backend reference"
    trainer = train(corpus, folder, f"{LOSS_FREE} {extra}")
    assert [record["step"] for record in trainer.log.records] == list(range(1, 7))


def test_random_numbers_depend_on_seed_step_and_rank_only(single, corpus, tmp_path):
    def draws(folder):
        trainer = Trainer(load_config(arguments(corpus, folder, LOSS_FREE)))
        drawn = []
        trainer.model.register_forward_hook(lambda *_: drawn.append(torch.rand(1).item()))
        trainer.train()
        return drawn

    whole, rest = draws(tmp_path / "new"), draws(stopped_at_step(4, single, tmp_path / "run"))
    assert len(set(whole)) == len(whole) == 8 * 4
    assert rest == whole[4 * 4 :]
