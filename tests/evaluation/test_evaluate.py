"""python -m torchlmoe.evaluate: texts as a table and as JSON, and bad input."""

import json
import re

import pytest

from torchlmoe import evaluate
from torchlmoe.evaluate import main
from torchlmoe.evaluation.recall import evaluate_recall
from torchlmoe.evaluation.texts import read_text, score_text


def test_texts_as_a_table_and_as_json(folder, model, tokenizer, tmp_path, capsys):
    good, bad, other = (tmp_path / name for name in ("good.txt", "bad.txt", "other.txt"))
    good.write_bytes("It is a truth, 🙂\r\n".encode())
    bad.write_bytes(b"\xff")
    other.write_bytes(b"x")
    output = tmp_path / "out.json"
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 text: byte 0 is 0xff.$"):
        main([f"--checkpoint={folder}", "--text", *map(str, (good, bad, other)), f"--output={output}"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["file", str(good), str(bad), str(other)]
    text = json.loads(output.read_text())["text"]
    for path in (good, other):
        expected = score_text(model, read_text(path, tokenizer), tokenizer, 64)
        assert text[str(path)] == pytest.approx(expected, rel=1e-12)
        assert text[str(path)].keys() == {"bits_per_byte", "perplexity", "num_bytes", "num_tokens"}
    assert text[str(bad)].keys() == {"error"}
    main([f"--checkpoint={folder}", f"--text={good}", f"--text={other}", "--max-length=4", f"--output={output}"])
    shorter = json.loads(output.read_text())["text"]
    assert shorter[str(good)] == pytest.approx(score_text(model, read_text(good, tokenizer), tokenizer, 4), rel=1e-12)
    assert shorter[str(good)] != text[str(good)]


def test_recall_as_a_table_and_as_json(folder, model, tokenizer, tmp_path, capsys):
    """Tasks by both ways of asking, of a model that was trained on text: its end token is the tasks', too."""
    output = tmp_path / "out.json"
    for by, flags in (("likelihood", []), ("generation", ["--recall-by=generation", "--seed=3"])):
        main([f"--checkpoint={folder}", "--recall=parity,needle", "--limit=2", *flags, f"--output={output}"])
        arguments = dict(by=by, num_documents=2, seed=3 * bool(flags), end_id=tokenizer.end_id)
        expected = evaluate_recall(model, ["parity", "needle"], **arguments)
        assert json.loads(output.read_text()) == {"recall": expected}
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].split() == ["recall", "by", "tokens", "right", "answers", "right", "answers"]
        assert [line.split()[0] for line in printed[1:]] == ["parity"] * 4 + ["needle"] * 9
        assert f"length 64, depth 0.5  {by}" in printed[6].replace("   ", "  ")
        accuracy = expected["needle"]["points"][1]["token_accuracy"]
        assert f"{accuracy:.4f} ± " in printed[6]


BAD = {
    "": "There is nothing to evaluate; give --tasks NAME,NAME, --text FILE or --recall NAME,NAME.",
    "--tasks ,": "There is nothing to evaluate",
    "--text x --include-path .": "--include-path has no effect without --tasks; give --tasks too.",
    "--tasks a --include-path nowhere": "--include-path nowhere is not a folder; give one with YAML files of tasks.",
    "--text x --max-length 0": "--max-length 0 must be at least 1.",
    "--text x --batch-size 0": "--batch-size 0 must be at least 1.",
    "--tasks a --num-fewshot -1": "--num-fewshot -1 must be at least 0.",
    "--tasks a --limit 0": "--limit 0.0 must be above 0: a number of documents, or a share below 1.",
    "--tasks a --limit nan": "--limit nan must be above 0",
    "--text x --output nowhere/out.json": "--output nowhere/out.json is in a folder that is missing; make it first.",
    "--text x --output .": "--output . is a folder; give the name of a file.",
    "--text x --dtype float8": "argument --dtype: invalid choice: 'float8'",
    "--recall mqar,s4": "There is no recall task 's4'; choose from mqar, selective_copying,",
    "--recall s3 --limit 0.5": "--limit 0.5 must be a whole number of documents with --recall.",
    "--recall s3 --limit inf": "--limit inf must be a whole number of documents with --recall.",
    "--recall s3 --recall-by guess": "argument --recall-by: invalid choice: 'guess'",
    "--recall s3 --seed -1": "--seed -1 must be at least 0 and less than 2^63.",
    "--text nowhere.txt": "nowhere.txt is missing.",
    "--text pyproject.toml/x": "pyproject.toml/x: Not a directory.",
    "--text x --checkpoint nowhere": "nowhere",
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD.items())
def test_bad_input(folder, arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        main(["--checkpoint", str(folder), *arguments.split()])
    assert "\n" not in str(error.value)


def test_tasks_without_lm_eval(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("--tasks needs lm-eval, which is not installed: pip install")):
        main(["--checkpoint", str(folder), "--tasks", "piqa"])
