"""python -m torchlmoe.generate on an exported model: text, order of prompts, files, bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchlmoe.checkpoint import open_model
from torchlmoe.checkpoint.exported import write_exported
from torchlmoe.config.load import load_config
from torchlmoe.data.tokenizer import load_tokenizer
from torchlmoe.generate import main
from torchlmoe.inference.generate import generate
from torchlmoe.model.decoder import build_on_meta

ROOT = Path(__file__).parent.parent
SMALL = """--model.dim 32 --model.num_layers 2 --model.layer_pattern LN --model.num_heads 2 --model.init_std 0.3
--moe.num_experts 4 --moe.top_k 2 --moe.expert_dim 16""".split()
GREEDY = ["--temperature", "0", "--max-new-tokens", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config, tokenizer = load_config(SMALL), load_tokenizer("embedded")
    model = build_on_meta(config, tokenizer.vocab_size).to_empty(device="cpu")
    model.init_weights(seed=0)
    folder = tmp_path_factory.mktemp("model") / "exported"
    write_exported(folder, model, config, tokenizer, max_shard_bytes=1 << 30)
    return folder


def output(capsys, folder, *arguments):
    main(["--checkpoint", str(folder), *arguments])
    return capsys.readouterr().out


def test_writes_prompts_with_their_continuations(capsys, folder, tmp_path):
    texts = ["It is a truth", "Ωmega 🙂", "No"]
    model, _, tokenizer = open_model(folder)
    ids = [[tokenizer.end_id, *prompt] for prompt in tokenizer.encode_batch(texts)]
    continuations = generate(model, ids, max_new_tokens=20, end_id=tokenizer.end_id)
    whole = [tokenizer.decode(prompt + more) for prompt, more in zip(ids, continuations, strict=True)]
    assert all(text.startswith(prompt) and text > prompt for text, prompt in zip(whole, texts, strict=True))

    (tmp_path / "prompt.txt").write_text(texts[2] + "\n")
    arguments = ["--prompt", texts[0], f"--prompt={texts[1]}", "--prompt-file", str(tmp_path / "prompt.txt"), *GREEDY]
    assert output(capsys, folder, *arguments) == "\n---\n".join(whole) + "\n"


def test_settings_reach_the_draws(capsys, folder):
    def text(*arguments):
        return output(capsys, folder, "--prompt", "It is", "--max-new-tokens", "20", *arguments)

    greedy = text("--temperature", "0")
    assert text() == text("--seed", "0") != text("--seed", "1")
    for arguments in (
        ["--top-k", "1"],
        ["--top-p", "1e-9"],
        ["--temperature", "1e-9"],
        ["--dtype", "float64", "--top-k", "1"],
    ):
        assert text(*arguments) == greedy
    assert text("--temperature", "0", "--repetition-penalty", "0.01") != greedy


def test_prompt_from_standard_input_streams_to_a_pipe(folder):
    """As a program: the same text as from the flag, ended by exit code 0; and 2 after bad input, with one sentence."""

    def program(*arguments, text=""):
        command = [sys.executable, "-m", "torchlmoe.generate", "--checkpoint", str(folder), *arguments]
        return subprocess.run(command, cwd=ROOT, input=text.encode(), capture_output=True)

    result = program("--prompt-file", "-", *GREEDY, text="Ωmega 🙂\n")
    assert result.returncode == 0
    assert result.stdout.decode().startswith("Ωmega 🙂")
    result = program("--prompt", "It", "--max-new-tokens", "100000000000000")
    assert result.returncode == 2
    printed = result.stderr.decode()
    assert printed.startswith("error: There is not enough memory (")
    assert printed.endswith("); choose smaller sizes, or fewer rows or tokens at once.\n")
    assert printed.count("\n") == 1


def test_json_and_stop_strings(capsys, folder):
    """One object per prompt, in their order; why it stopped, and nothing of the stop string."""
    texts = ["It is a truth", "Ωmega 🙂"]
    prompts = [f"--prompt={text}" for text in texts]
    whole = [json.loads(line) for line in output(capsys, folder, *prompts, *GREEDY, "--json").splitlines()]
    assert [row["prompt"] for row in whole] == texts
    assert [(row["num_tokens"], row["finish_reason"]) for row in whole] == [(20, "length")] * 2
    stop = whole[1]["text"][4:9]
    cut = [
        json.loads(line)
        for line in output(capsys, folder, *prompts, *GREEDY, "--json", f"--stop={stop}", "--stop=\x01").splitlines()
    ]
    assert cut[1]["text"] == whole[1]["text"][: whole[1]["text"].find(stop)]
    assert cut[1]["finish_reason"] == "stop"
    assert cut[1]["num_tokens"] < 20
    assert cut[0] == whole[0]
    printed = output(capsys, folder, *prompts, *GREEDY, f"--stop={stop}")
    assert printed == "\n---\n".join(row["prompt"] + row["text"] for row in cut) + "\n"


BAD = {
    "": "There is no prompt",
    "--prompt=": "A prompt is empty",
    "--prompt \udcff": "--prompt '\\udcff' is not UTF-8 text.",
    "--prompt x --stop=": "A stop string is empty",
    "--prompt x --stop \udcff": "--stop '\\udcff' is not UTF-8 text.",
    "--prompt x --temperature -1": "temperature = -1.0 must be 0",
    "--prompt x --temperature warm": "argument --temperature: invalid float value: 'warm' (see --help).",
    "--prompt x --top-k 0": "top_k = 0 must be at least 1",
    "--prompt x --top-p 1.5": "top_p = 1.5 must lie above 0",
    "--prompt x --repetition-penalty 0": "repetition_penalty = 0.0 must be a positive number",
    "--prompt x --seed -1": "seed = -1 must be at least 0 and less than 2^63.",
    f"--prompt x --seed {2**64}": "must be at least 0 and less than 2^63.",
    "--prompt x --max-new-tokens 0": "max_new_tokens = 0 must be at least 1",
    "--prompt x --dtype float8": "argument --dtype: invalid choice: 'float8'",
    "--prompt x --topk 3": "unrecognized arguments: --topk 3",
    "--prompt-file nowhere.txt": "--prompt-file nowhere.txt cannot be read as UTF-8 text",
    "--prompt-file assets/embedded/train.parquet": "cannot be read as UTF-8 text",
    "--prompt x --checkpoint nowhere": "nowhere",
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD.items())
def test_bad_input(folder, arguments, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        main(["--checkpoint", str(folder), *arguments.split()])
    assert "\n" not in str(error.value)
