"""The model under lm-eval: log-likelihoods by hand, a local multiple-choice task, generation, the stock hellaswag, and
the scores of lm-eval's own wrapper of a transformers model of equal weights."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from tests.interop.families import CASES, all_in_float64, their_model
from torchlmoe import generate as program
from torchlmoe import import_model
from torchlmoe.checkpoint import open_model
from torchlmoe.checkpoint.conventions import Conventions, _max_length, conventions_of
from torchlmoe.evaluate import main
from torchlmoe.evaluation.harness import HarnessModel
from torchlmoe.inference.generate import generate

QUESTIONS = [
    ("The whale is", [" a fish", " a mammal"], 1),
    ("It is a truth ", ["universally acknowledged", "that"], 0),
    ("Call me", [" Ishmael", " late", "."], 0),
]
LONG = "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want. " * 4


@pytest.fixture(autouse=True)
def without_a_list_of_packages(monkeypatch):
    """lm-eval asks pip for all of them each time, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def asked(*requests):
    return [SimpleNamespace(args=request) for request in requests]


def by_hand(model, tokenizer, context, continuation):
    row = tokenizer.encode_batch([context + continuation])[0] if isinstance(context, str) else context + continuation
    start = len(tokenizer.encode_batch([context.rstrip()])[0]) if isinstance(context, str) else len(context)
    with torch.no_grad():
        logits = model(torch.tensor([row]))[0, start - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(row[start:])[:, None]).sum())


@pytest.fixture
def harness(model, tokenizer):
    return HarnessModel(model, tokenizer, conventions=as_wrapper(tokenizer))


def as_wrapper(tokenizer, before=()):
    """What lm-eval's wrapper does with a tokenizer that adds `before`."""
    return Conventions(
        tuple(before), tokenizer.end_id, scores_beginning=True, max_length=64, end_ids=(tokenizer.end_id,)
    )


def test_log_likelihoods_are_those_computed_by_hand(harness, model, tokenizer):
    """Trailing spaces of a context go to the continuation; an empty context is the end token."""
    pairs = [(context, answer) for context, answers, _ in QUESTIONS for answer in answers]
    found = harness.loglikelihood(asked(*pairs, ("", "Call me")), disable_tqdm=True)
    for (context, answer), (log_likelihood, _) in zip(pairs, found, strict=False):
        assert log_likelihood == pytest.approx(by_hand(model, tokenizer, context, answer), abs=1e-9)
    ids = tokenizer.encode_batch(["Call me"])[0]
    assert found[-1][0] == pytest.approx(by_hand(model, tokenizer, [tokenizer.end_id], ids), abs=1e-9)
    begun = HarnessModel(model, tokenizer, conventions=as_wrapper(tokenizer, [tokenizer.end_id]))
    ((log_likelihood, _),) = begun.loglikelihood(asked(("Call me", " Ishmael")), disable_tqdm=True)
    context, answer = ([tokenizer.end_id, *ids], tokenizer.encode_batch(["Call me Ishmael"])[0][len(ids) :])
    assert log_likelihood == pytest.approx(by_hand(model, tokenizer, context, answer), abs=1e-9)


def test_long_contexts_lose_tokens_on_the_left_and_texts_are_windows(harness, model, tokenizer):
    ids, answer = tokenizer.encode_batch([LONG, LONG + " End"])
    answer = answer[len(ids) :]
    assert len(ids) > 64
    ((log_likelihood, _),) = harness.loglikelihood(asked((LONG.rstrip(), " End")), disable_tqdm=True)
    ids = tokenizer.encode_batch([LONG.rstrip()])[0]
    answer = tokenizer.encode_batch([LONG.rstrip() + " End"])[0][len(ids) :]
    kept = ids[-(65 - len(answer)) :]
    assert log_likelihood == pytest.approx(by_hand(model, tokenizer, kept, answer), abs=1e-9)

    (rolling, empty) = harness.loglikelihood_rolling(asked((LONG,), ("",)), disable_tqdm=True)
    assert empty == 0
    row = [tokenizer.end_id, *tokenizer.encode_batch([LONG])[0]]
    # The last window has a whole length of context, as of lm-eval, but begins where what it scores does, less one.
    expected = sum(
        by_hand(model, tokenizer, row[start : start + 1], row[start + 1 : start + 65])
        for start in range(0, len(row) - 1, 64)
        if start + 64 < len(row)
    )
    last = (len(row) - 2) // 64 * 64
    tail = row[last + 1 :]
    context = row[len(row) - 1 - 64 : last + 1]
    assert rolling == pytest.approx(expected + by_hand(model, tokenizer, context, tail), abs=1e-9)


def test_generations_end_at_stop_strings(harness, model, tokenizer):
    contexts = ["The whale", "It is a truth", ""]
    greedy = {"until": ["\n\n\n"], "max_gen_toks": 12}
    texts = harness.generate_until(asked(*((context, greedy) for context in contexts)), disable_tqdm=True)
    ids = [tokenizer.encode_batch([context])[0] or [tokenizer.end_id] for context in contexts]
    whole = [
        tokenizer.decode(prompt + more)[len(context) :]
        for context, prompt, more in zip(
            contexts, ids, generate(model, ids, max_new_tokens=12, end_id=tokenizer.end_id), strict=True
        )
    ]
    assert texts == whole
    stop = whole[0][3:6]
    (cut, drawn, again) = harness.generate_until(
        asked(
            (contexts[0], {"until": stop, "max_gen_toks": 12}),
            (contexts[0], {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0, "top_k": 50}),
            (contexts[0], {"until": [], "max_new_tokens": 3, "do_sample": False, "temperature": 5.0}),
        ),
        disable_tqdm=True,
    )
    assert cut == whole[0][: whole[0].find(stop)]
    assert drawn != whole[0]
    assert whole[0].startswith(again)
    with pytest.raises(ValueError, match="generation with num_beams; supported are until"):
        harness.generate_until(asked(("a", {"until": [], "num_beams": 3})))
    with pytest.raises(ValueError, match="up to 64 tokens, which leaves no room for a prompt"):
        harness.generate_until(asked(("a", {"until": [], "max_gen_toks": 64})))


@pytest.fixture
def tasks(tmp_path):
    """A multiple-choice task and one of generation on local files."""
    lines = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/questions.jsonl
test_split: test
doc_to_text: "{{{{question}}}}"
metadata:
  version: 1.0
"""
    (tmp_path / "choice.yaml").write_text(
        f"""task: local_choice
output_type: multiple_choice
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
{data}"""
    )
    (tmp_path / "generation.yaml").write_text(
        f"""task: local_generation
output_type: generate_until
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
{data}"""
    )
    return tmp_path


def test_tasks_of_local_files_and_the_stock_hellaswag(folder, model, tokenizer, tasks, tmp_path, monkeypatch, capsys):
    """By the program, as a table and as JSON; accuracies are those by hand."""
    hellaswag = tmp_path / "Rowan" / "hellaswag"
    hellaswag.mkdir(parents=True)
    lines = [
        {
            "ind": index, "activity_label": "Whaling", "ctx_a": "He rows.", "ctx_b": "the whale", "ctx": "He rows. the",
            "endings": [" sinks.", " sings [title] aloud.", " is far.", " dives."], "source_id": f"a~{index}",
            "split": "val", "split_type": "indomain", "label": str(index % 4),
        }
        for index in range(4)
    ]  # fmt: skip
    for split in ("train", "validation"):
        (hellaswag / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = "local_choice,local_generation,hellaswag"
    # The folder of the stock task alone: to read the names of all of them takes ten seconds.
    stock = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    paths = [f"--include-path={path}" for path in (tasks, stock)]
    main([f"--checkpoint={folder}", f"--tasks={names}", *paths, "--output=out.json"])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    right = 0
    for question, choices, answer in QUESTIONS:
        values = [by_hand(model, tokenizer, question, choice) for choice in choices]
        right += values.index(max(values)) == answer
    results = written["results"]
    assert results["local_choice"]["acc,none"] == pytest.approx(right / 3)
    assert results["local_generation"]["exact_match,none"] == 0
    assert results["hellaswag"]["acc,none"] == 0.25  # one answer to four equal questions with four labels
    assert written["n-samples"]["hellaswag"]["effective"] == 4
    assert all(re.search(rf"\|{name} *\|", printed) for name in names.split(","))


def test_data_that_cannot_be_loaded(folder, tasks, monkeypatch):
    text = (tasks / "choice.yaml").read_text()
    (tasks / "gone.yaml").write_text(text.replace("local_choice", "gone").replace("questions.jsonl", "nowhere.jsonl"))
    with pytest.raises(
        ValueError, match=r"data of the tasks gone cannot be loaded .*without a network, start"
    ) as error:
        main([f"--checkpoint={folder}", "--tasks=gone", f"--include-path={tasks}"])
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_names_of_stock_tasks(folder, tasks, monkeypatch):
    """Unknown ones, and the paper's without a network."""
    with pytest.raises(ValueError, match="There is no task nothing, nowhere; see `lm-eval ls tasks`"):
        main([f"--checkpoint={folder}", "--tasks=nothing,piqa,nowhere", f"--include-path={tasks}"])
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("piqa", "winogrande", "arc_easy", "arc_challenge", "mmlu_anatomy"):
        with pytest.raises(ValueError, match=f"data of the tasks {name} cannot be loaded"):
            main([f"--checkpoint={folder}", f"--tasks={name}"])


def byte_tokenizer(folder, kind, special=0):
    """Bytes with <s> and </s>. kind: "begins" puts <s> before every text; "falls_back" spells words by bytes and puts a
    space before the first one, as Llama's does. special: the id of one more special token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"] if kind == "falls_back" else alphabet
    vocabulary = {token: index for index, token in enumerate(["</s>", "<s>", *pieces])}
    options = dict(unk_token="<unk>", byte_fallback=True) if kind == "falls_back" else {}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], **options))
    made.add_special_tokens(["</s>", "<s>", made.id_to_token(special)])
    if kind == "falls_back":
        normal, back = tokenizers.normalizers, tokenizers.decoders
        made.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
        made.decoder = back.Sequence([back.Replace("▁", " "), back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)])
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
    if kind == "begins":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    begin = {"bos_token": "<s>"} if kind == "begins" else {}
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>", **begin).save_pretrained(folder)
    return len(vocabulary)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("mixtral", "begins"), ("qwen3_next", "plain"), ("mixtral", "falls_back")]
)
def test_a_folder_of_transformers_gets_the_scores_of_lm_evals_own_wrapper(model_type, kind, tmp_path, tasks, capsys):
    """Log-likelihoods, rolling ones and generations; opened directly, imported, and by the program as it is.

    The embedding has more rows than the tokenizer has tokens, and two tokens end a text.
    """
    from lm_eval.models.huggingface import HFLM

    size = byte_tokenizer(tmp_path / "theirs", kind)
    options = CASES[model_type][1] | dict(max_position_embeddings=96, eos_token_id=0, bos_token_id=1)
    theirs = their_model(model_type, **options | {"vocab_size": size + 5})
    theirs.get_output_embeddings().weight.data[size:] = 0  # are never the likeliest

    def wrapped():
        theirs.save_pretrained(tmp_path / "theirs")
        return HFLM(pretrained=theirs, tokenizer=str(tmp_path / "theirs"), batch_size=2, device="cpu")

    wrapper = wrapped()
    prompt = wrapper.tok_encode("The whale")

    def greedy(num_tokens):
        with all_in_float64():
            whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
        return whole[0, len(prompt) :].tolist()

    if kind == "falls_back":  # the first token of the continuation becomes a space
        head, (first,) = theirs.get_output_embeddings().weight.data, greedy(1)
        head[[first, size - 1]] = head[[size - 1, first]]
    written = greedy(9)
    texts = LONG + "".join(context + "".join(answers) for context, answers, _ in QUESTIONS)
    ending = next(token for token in written[2:] if token not in wrapper.tok_encode(texts))
    byte_tokenizer(tmp_path / "theirs", kind, special=ending)
    theirs.generation_config.eos_token_id = [0, ending]
    wrapper = wrapped()
    assert wrapper.max_length == 96
    assert (wrapper.tok_encode("a")[0] == 1) == (kind == "begins")
    pairs = [(context, answer) for context, answers, _ in QUESTIONS for answer in answers]
    scored = asked(*pairs, ("", "Call me"), (LONG, "End"), (LONG.rstrip(), " in the end"))
    whole = asked((LONG,), ("Call me Ishmael",))
    continued = asked(*((text, {"until": ["\n\n"], "max_gen_toks": 10}) for text in ("The whale", "Call me", LONG)))
    with all_in_float64():
        log_likelihoods = wrapper.loglikelihood(scored, disable_tqdm=True)
        rolling = wrapper.loglikelihood_rolling(whole, disable_tqdm=True)
        texts = wrapper.generate_until(continued, disable_tqdm=True)

    prompts = [f"--prompt={request.args[0]}" for request in continued[:2]]
    capsys.readouterr()
    greedy = ["--temperature=0", "--max-new-tokens=10", "--stop=\n\n", "--json"]
    program.main([f"--checkpoint={tmp_path / 'theirs'}", *prompts, *greedy])
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    # The program shows the space between prompt and continuation, which the wrapper loses.
    assert [line["text"].removeprefix(" " * (kind == "falls_back")) for line in lines] == texts[:2]
    assert lines[0]["finish_reason"] == "end"

    import_model.main(["--model", str(tmp_path / "theirs"), "--output", str(tmp_path / "run")])
    for folder in (tmp_path / "theirs", tmp_path / "run"):
        model, config, tokenizer = open_model(folder)
        ours = HarnessModel(model, tokenizer, conventions=conventions_of(folder, config, tokenizer))
        assert ours.max_length == 96
        for found, wanted in zip(ours.loglikelihood(scored, disable_tqdm=True), log_likelihoods, strict=True):
            assert found == pytest.approx(wanted, abs=1e-5)
        assert ours.loglikelihood_rolling(whole, disable_tqdm=True) == pytest.approx(rolling, abs=1e-5)
        assert ours.generate_until(continued, disable_tqdm=True) == texts

    output = tmp_path / "out.json"
    main(
        [f"--checkpoint={tmp_path / 'theirs'}", "--tasks=local_choice", f"--include-path={tasks}", f"--output={output}"]
    )
    with all_in_float64():
        results = lm_eval.simple_evaluate(
            wrapper,
            tasks=["local_choice"],
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        )["results"]
    assert json.loads(output.read_text())["results"]["local_choice"]["acc,none"] == results["local_choice"]["acc,none"]


def test_what_was_trained_here_begins_with_the_end_token(folder, model, tokenizer, tasks, tmp_path):
    """By the program: an answer's log-likelihood shows what stood before its context."""
    text = (tasks / "choice.yaml").read_text().replace("local_choice", "likelihood")
    metric = "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
    text = re.sub(r"metric_list:.*?true\n", metric, text, flags=re.DOTALL)
    text = text.replace("output_type: multiple_choice", "output_type: loglikelihood").replace(
        "doc_to_choice: choices\n", ""
    )
    (tasks / "likelihood.yaml").write_text(text.replace("doc_to_target: answer", 'doc_to_target: "{{choices[0]}}"'))
    found = {}
    for flag in ("", "--begin-with-end", "--no-begin-with-end"):
        output = tmp_path / "out.json"
        arguments = [f"--checkpoint={folder}", "--tasks=likelihood", f"--include-path={tasks}", f"--output={output}"]
        main([*arguments, *flag.split()])
        found[flag] = json.loads(output.read_text())["results"]["likelihood"]["perplexity,none"]
    begun, plain = [], []
    for question, choices, _ in QUESTIONS:
        context = tokenizer.encode_batch([question.rstrip()])[0]
        answer = tokenizer.encode_batch([question + choices[0]])[0][len(context) :]
        begun.append(by_hand(model, tokenizer, [tokenizer.end_id, *context], answer))
        plain.append(by_hand(model, tokenizer, context, answer))
    assert found[""] == found["--begin-with-end"] == pytest.approx(math.exp(-sum(begun) / 3), rel=1e-9)
    assert found["--no-begin-with-end"] == pytest.approx(math.exp(-sum(plain) / 3), rel=1e-9)
    assert found[""] != pytest.approx(found["--no-begin-with-end"], rel=1e-3)


def test_maximum_lengths_are_those_of_lm_evals_wrapper():
    """Of the model's settings, else of the tokenizer's, else 2048; 10**30 stands for no limit."""
    from lm_eval.models.huggingface import resolve_max_length
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    for content in ({}, {"n_ctx": 7}, {"n_positions": 5, "max_position_embeddings": 6}, {"max_position_embeddings": 6}):
        for tokenizer in ({}, {"model_max_length": 300}, {"model_max_length": VERY_LARGE_INTEGER}):
            expected = resolve_max_length(SimpleNamespace(**content), SimpleNamespace(**tokenizer))
            assert _max_length(content, tokenizer) == expected
