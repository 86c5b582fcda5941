"""A run on a recall task: what it logs, what its checkpoint opens as, and that only the task's labels count."""

import json

import pytest
import torch

import train
from tests.programs import run_program
from torchlmoe import evaluate, plan, prepare
from torchlmoe.checkpoint import open_model
from torchlmoe.data.recall.store import RecallStore
from torchlmoe.evaluation import recall
from torchlmoe.evaluation.recall import evaluate_recall, trained_options

SMALL = """--model.dim 16 --model.num_layers 2 --model.layer_pattern LN --model.num_heads 2 --model.layers.L.mlp dense
--model.layers.N.mlp dense --training.seq_len 80 --training.global_batch_size 2 --training.device cpu --training.steps 3
--data.dataset recall:mqar --data.reader_options.length 40 --data.reader_options.num_pairs 4
--data.reader_options.vocab_size 24 --data.reader_options.validation_documents 5 --checkpoint.enable true
--metrics.log_freq 1""".split()


def test_a_run_on_a_recall_task(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    result = run_program(train.main, [*SMALL, "--job.dump_folder", str(folder)], tmp_path)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert abs(records[0]["loss"] - torch.tensor(24.0).log()) < 0.5
    assert "val_bits_per_byte" not in records[-1]
    assert f"val_loss {records[-1]['val_loss']:.4f}" in result.stdout
    assert "has no effect in this run" not in result.stdout
    assert (folder / "loss_curve.png").exists()

    model, config, tokenizer = open_model(folder)
    assert tokenizer.vocab_size == 24
    assert tokenizer.encode_batch(["7 23"]) == [[7, 23]]
    store = RecallStore("mqar", "validation", **config.data.reader_options)
    nll = []
    for number in range(5):
        tokens, labels, _ = (torch.from_numpy(part) for part in store.document(number))
        log_probabilities = model(tokens[None])[0].log_softmax(-1)
        nll += [-log_probabilities[place, labels[place]].item() for place in range(40) if labels[place] >= 0]
    assert len(nll) == 20
    assert records[-1]["val_loss"] == pytest.approx(sum(nll) / 20, rel=1e-5)

    options = trained_options(config.data)
    points = {"mqar": [{"num_pairs": 2, "length": 20}]}
    found = evaluate_recall(model, ["mqar"], options=options, points=points, num_documents=2)
    assert found["mqar"]["points"][0]["num_questions"] == 4
    monkeypatch.setitem(recall.RECALL, "mqar", tuple(points["mqar"]))
    output = tmp_path / "out.json"
    evaluate.main([f"--checkpoint={folder}", "--recall=mqar", "--limit=2", f"--output={output}"])
    assert json.loads(output.read_text())["recall"] == found  # with the options of the run
    monkeypatch.setitem(recall.RECALL, "mqar", ({"num_pairs": 16, "length": 80},))
    with pytest.raises(ValueError, match="num_pairs = 16") as error:
        evaluate.main([f"--checkpoint={folder}", "--recall=mqar"])
    assert "\n" not in str(error.value)


def test_other_programs_on_a_recall_task(capsys):
    with pytest.raises(ValueError, match="recall:mqar is drawn from a seed when it is read: there is nothing to"):
        prepare.main(SMALL)
    plan.main(["--world-size", "1", *SMALL])
    assert "memory" in capsys.readouterr().out.lower()
