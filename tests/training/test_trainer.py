"""A whole run from the command line: files, figures, accumulation, determinism, bad input; schedule and optimizer."""

import json
import math
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from tests.programs import run_program
from torchlmoe.config.load import load_config
from torchlmoe.config.settings import LRScheduler, Metrics, Optimizer
from torchlmoe.data.tokenizer import load_tokenizer
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.training import peak
from torchlmoe.training.metrics import MetricsLog
from torchlmoe.training.optimizer import build_optimizer, clip_gradients
from torchlmoe.training.schedule import lr_factor

SMALL = """--model.dim 32 --model.num_layers 2 --model.layer_pattern LN --model.num_heads 2 --moe.num_experts 4
--moe.top_k 2 --moe.expert_dim 16 --training.seq_len 32 --training.local_batch_size 2 --training.device cpu
--training.steps 6 --metrics.log_freq 2""".split()


def run_train(corpus, folder, *arguments):
    data = ["--data.dataset", str(corpus), "--data.cache_dir", f"{corpus}/cache", "--job.dump_folder", str(folder)]
    return run_program(train.main, [*SMALL, *data, *arguments], folder.parent)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_should(corpus, tmp_path):
    result = run_train(corpus, tmp_path)
    assert result.returncode == 0, result.stderr
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 4, 6]
    expected = ["step", "loss", "grad_norm", "lr", "tokens_seen", "tokens_per_second", "mfu", "memory_gib"]
    expected += [
        f"moe/0/{name}" for name in ("load_max_over_mean", "load_entropy", "aux_loss", "dropped_fraction", "load")
    ]
    for record in records(tmp_path):
        assert set(expected) <= set(record)
        assert sum(record["moe/1/load"]) == 2 * 2 * 32
    last = records(tmp_path)[-1]
    assert last["tokens_seen"] == 6 * 2 * 32
    assert abs(last["val_loss"] - math.log(4096)) < 0.5
    assert (tmp_path / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "finished").exists()
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert load_config(["--job.config_file", str(tmp_path / "config.toml")]).training.steps == 6
    assert "eta" in result.stdout
    assert f"val_bits_per_byte {last['val_bits_per_byte']:.4f}" in result.stdout

    texts = [json.loads(line)["text"] for line in (corpus / "validation.jsonl").read_text().splitlines()]
    ids = load_tokenizer("embedded").encode_batch(texts)
    nats = last["val_loss"] * sum(len(document) + 1 for document in ids)
    bits_per_byte = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert last["val_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-12)

    again = run_train(corpus, tmp_path)  # a second run keeps the first one's figures
    assert again.returncode == 0
    assert len(list(tmp_path.glob("metrics.*.jsonl"))) == 1


def test_deterministic_runs_are_equal_bit_for_bit(corpus, tmp_path):
    for name in ("first", "second"):
        result = run_train(corpus, tmp_path / name, "--training.deterministic", "true", "--validation.enable", "false")
        assert result.returncode == 0, result.stderr
    timed = ("tokens_per_second", "mfu", "memory_gib")
    first, second = (
        [{key: value for key, value in record.items() if key not in timed} for record in records(tmp_path / name)]
        for name in ("first", "second")
    )
    assert first == second
    assert run_train(corpus, tmp_path / "third", "--training.seed", "1").returncode == 0
    assert records(tmp_path / "third")[0]["loss"] != first[0]["loss"]


def test_figures_that_are_removed_during_the_run(tmp_path, caplog):
    """Files are written again; in a folder that is gone, or is another run's by now, nothing is written."""
    (tmp_path / "run").mkdir()
    log = MetricsLog(tmp_path / "run", Metrics(plot=False), num_steps=9, active=True)
    log.log({"step": 1, "speed": 2.0})
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    log.log({"step": 2, "speed": 1.0})
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    assert caplog.text.count("was removed during the run: it is written again.") == 2
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    assert [event.step for event in events.Reload().Scalars("speed")] == [1, 2]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    log.finish()
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    shutil.rmtree(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(OSError, match=r"figures of step 3 could not be written .* was removed or replaced"):
            log.log({"step": 3})
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(OSError, match=r"The figures could not be written .* was removed or replaced"):
        log.finish()
    log.close()


def test_peak_is_not_that_of_a_first_slow_product(monkeypatch):
    """Which takes longer than all the others together, and of products that run as the model's."""
    clock, slow = [0.0], iter([1.0, 0.3])

    def linear(a, b):
        assert a.dtype is b.dtype is torch.bfloat16
        clock[0] += next(slow, 0.01)

    monkeypatch.setattr(peak, "linear", linear)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: clock[0])
    assert peak._measured_on_cpu.__wrapped__(torch.bfloat16) == pytest.approx(2 * 1024**3 / 0.01)


def test_schedule():
    def factors(**settings):
        schedule = LRScheduler(**settings)
        return [lr_factor(step, 11, schedule) for step in range(11)]

    cosine = factors(decay="cosine", min_lr_factor=0.1)
    assert cosine == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)])
    linear = factors(decay="linear", min_lr_factor=0.0, warmup_steps=4)
    assert linear == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    wsd = factors(decay="wsd", min_lr_factor=0.5, warmup_steps=1, decay_fraction=0.4)
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 5 / 6, 4 / 6, 0.5])
    for decay_fraction in (0.1, 1e-3):  # of 11 steps, one and none
        short = factors(decay="wsd", min_lr_factor=0.5, decay_fraction=decay_fraction)
        assert short == pytest.approx([1] * 10 + [0.5])
    assert factors(warmup_steps=11)[-1] == pytest.approx(11 / 12)


def test_optimizer_decays_matrices_only_and_clips():
    model = build_on_meta(load_config(["--model.dim", "32", "--model.num_heads", "2"]), 50).to_empty(device="cpu")
    model.init_weights(0)
    optimizer = build_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if parameter.dim() > 1 else 1))

    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.cat([gradient.flatten() for gradient in gradients]).double().norm().float()
    torch.testing.assert_close(clip_gradients(model, 2.0), norm, rtol=2e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 2 / norm, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(clip_gradients(model, 5.0), torch.tensor(2.0), rtol=2e-5, atol=0)
    no_clipping = load_config(["--training.max_norm", "0"]).training.max_norm
    for _ in range(2):
        torch.testing.assert_close(clip_gradients(model, no_clipping), torch.tensor(2.0), rtol=2e-5, atol=0)
