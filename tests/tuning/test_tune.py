"""A search without runs: trials, halving, resuming after a kill; and one with runs."""

import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import write_corpus
from torchlmoe import tune
from torchlmoe.config.load import load_config
from torchlmoe.tuning import runs as runs_module
from torchlmoe.tuning.halving import Outcome, Plan, as_json, lengths_of, search
from torchlmoe.tuning.picture import draw
from torchlmoe.tuning.runs import Runs
from torchlmoe.tuning.trials import Range, at_edge, choices, trials

RATES = [f"{0.001 * 2.0**power:.6g}" for power in range(-6, 7)]
MODEL = """--model.dim 32 --model.num_layers 1 --model.layer_pattern L --model.layers.L.mlp dense --model.num_heads 2
--training.seq_len 32 --training.global_batch_size 4 --training.device cpu --metrics.log_freq 1000""".split()
PARITY = "--data.dataset recall:parity --data.reader_options.length 32 --data.reader_options.validation_documents 64"
SMALL = [*MODEL, *PARITY.split()]


def test_lists_ranges_and_multiples():
    assert choices("optimizer.lr", "1e-3, 2e-3,1e-3", 0.1) == ["1e-3", "2e-3"]
    assert choices("optimizer.lr", "x4", 0.01) == ["0.0025", "0.005", "0.01", "0.02", "0.04"]
    assert choices("training.global_batch_size", "x4", 2) == ["1", "2", "4", "8"]
    assert choices("optimizer.lr", "1e-4:1e-2:log", 0.1) == Range(1e-4, 1e-2, True, False)
    assert choices("model.num_layers", "1:9", 4) == Range(1, 9, False, True)
    for text, own, sentence in (
        ("x16", None, "multiplies the recipe's value, which is None"),
        ("x1", 0.1, "tries one value"),
        ("2:1", 0.1, "is not a range; write lo:hi"),
        ("-inf:1", 0.1, "is not a range; write lo:hi"),
        ("1:2:lag", 0.1, "is not a range"),
        ("0:1:log", 0.1, "needs a logarithm"),
        ("1,,2", 0.1, "has an empty value"),
    ):
        with pytest.raises(ValueError, match=sentence):
            choices("optimizer.lr", text, own)


def test_a_grid_has_all_combinations_and_draws_are_spread():
    assert trials({"a": ["1", "2"], "b": ["3", "4"]}, 9, 0) == [
        {"a": "1", "b": "3"},
        {"a": "1", "b": "4"},
        {"a": "2", "b": "3"},
        {"a": "2", "b": "4"},
    ]
    drawn = trials({"a": Range(1e-4, 1.0, True, False), "b": ["x", "y"]}, 8, 0)
    assert drawn == trials({"a": Range(1e-4, 1.0, True, False), "b": ["x", "y"]}, 8, 0)
    assert drawn != trials({"a": Range(1e-4, 1.0, True, False), "b": ["x", "y"]}, 8, 1)
    places = sorted(math.log10(float(values["a"])) for values in drawn)
    assert all(-4 + part / 2 <= place <= -4 + (part + 1) / 2 for part, place in enumerate(places))
    assert sorted(values["b"] for values in drawn) == ["x"] * 4 + ["y"] * 4


def test_edges():
    tried = [{"a": "1", "b": "u", "c": "3"}, {"a": "10", "b": "v", "c": "3"}, {"a": "9", "b": "v", "c": "3"}]
    assert at_edge(tried, tried[1]) == ["a"]
    assert at_edge(tried, tried[2]) == []


def plan_of(rates, steps=64):
    return Plan({}, [{"optimizer.lr": rate} for rate in rates], lengths_of(steps, 3, 4), 4)


def curve(trial, round_, values, steps):
    """A loss whose best rate is 0.02, and 0.03 in short runs; above 0.03 a full run fails."""
    best = 0.02 if steps == 64 else 0.03
    rate = float(values["optimizer.lr"])
    if rate > 0.03 and steps == 64:
        return Outcome(trial, round_, steps, values, None, "error: not finite", 0.0)
    return Outcome(trial, round_, steps, values, math.log(rate / best) ** 2 - steps / 100, None, 0.0)


def test_the_best_is_found_at_a_third_of_the_cost():
    plan, written = plan_of(RATES), []
    best = search(plan, [], curve, lambda outcomes: written.append(list(outcomes)), processes=2, say=lambda line: None)
    assert best.round == 2
    assert best.steps == 64
    assert 0.5 <= float(best.values["optimizer.lr"]) / 0.02 <= 2
    record = as_json(plan, written[-1], best)
    assert [len([run for run in record["runs"] if run["round"] == round_]) for round_ in range(3)] == [13, 4, 2]
    assert record["steps"] == 13 * 4 + 4 * 16 + 2 * 64
    assert record["steps"] < record["steps_of_full_sweep"] / 3
    assert json.loads(json.dumps(record)) == record


def test_a_search_that_was_cut_off_at_any_run_ends_alike():
    plan, whole = plan_of(RATES), []
    best = search(plan, [], curve, lambda outcomes: None, processes=1, say=lambda line: None)
    search(plan, [], curve, lambda outcomes: whole.append(list(outcomes)), processes=1, say=lambda line: None)
    for done in whole:
        again = []

        def counted(*of_run, again=again):
            again.append(of_run[:2])
            return curve(*of_run)

        assert search(plan, done, counted, lambda outcomes: None, processes=1, say=lambda line: None) == best
        assert len(again) == len(whole) - len(done)


def test_a_round_in_which_all_fail():
    def failing(trial, round_, values, steps):
        return Outcome(trial, round_, steps, values, None, "error: The loss is not finite.", 0.0)

    with pytest.raises(ValueError, match=r"All runs of round 1 failed\. The first error: error: The loss"):
        search(plan_of(RATES), [], failing, lambda outcomes: None, processes=1, say=lambda line: None)


def test_one_error_ends_a_search():
    def broken(trial, round_, values, steps):
        if trial == 3:
            raise ValueError("ended with exit code -9")
        return curve(trial, round_, values, steps)

    with pytest.raises(ValueError, match="exit code -9"):
        search(plan_of(RATES), [], broken, lambda outcomes: None, processes=2, say=lambda line: None)


def test_the_picture_takes_numbers_words_and_several_settings(tmp_path):
    for number, tried in enumerate(([{"a": rate} for rate in RATES], [{"a": "1", "b": "u"}, {"a": "2", "b": "v"}])):
        plan = Plan({}, tried, [4, 64], 4)
        outcomes = [Outcome(trial, 0, 4, values, float(trial), None, 0.0) for trial, values in enumerate(tried)]
        outcomes.append(Outcome(0, 1, 64, tried[0], 0.5, None, 0.0))
        draw(as_json(plan, outcomes, outcomes[-1]), tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_has_its_own_length_and_folder(tmp_path):
    config = load_config([*SMALL, "--training.steps", "64", "--lr_scheduler.warmup_steps", "8"])
    runs = Runs([*SMALL, "--training.steps", "64"], config, tmp_path, processes=1, steps=64)
    of_run = load_config(runs.flags(tmp_path / "run", {"optimizer.lr": "0.5"}, 16))
    assert (of_run.training.steps, of_run.lr_scheduler.warmup_steps, of_run.optimizer.lr) == (16, 2, 0.5)
    assert of_run.job.dump_folder == str(tmp_path / "run")
    assert of_run.checkpoint.enable
    assert of_run.validation.interval == 16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "There is nothing to tune; give --tune.optimizer.lr"),
        (["--tune.optimizer.lr"], "needs values"),
        (["--tune.optimizer.lr", "1e-3"], "Each setting has one value"),
        (["--tune.optimizer.lr", "1,2", "--tune.optimizer.lr", "3"], "is given twice"),
        (["--tune.optimizer.rl", "1,2"], "optimizer.rl is not a setting"),
        (["--tune.training.steps", "1,2"], "the search sets training.steps"),
        (["--tune.optimizer.lr", "1e-3,-1"], "optimizer.lr"),
        (["--tune.optimizer.lr", "1e-3,1", "--processes", "0"], "--processes 0 must be at least 1"),
        (["--tune.optimizer.lr", "1e-3,1", "--training.steps", "3"], "is too few for --rounds 3 with --keep 4"),
        (["--tune.optimizer.lr", "1e-3,1", "--validation.enable", "false"], "leaves nothing to compare runs by"),
    ],
)
def test_bad_input(arguments, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        tune.main([*SMALL, "--output", str(tmp_path / "found.json"), *arguments])
    assert not (tmp_path / "found.json").exists()


def test_values_of_a_mixers_own_settings():
    """Given in the recipe, the mixer's default, in another table of options, or mistyped."""
    config = load_config(["--model.layers.L.conv_size", "3", "--data.dataset", "recall:mqar"])
    config.data.reader_options = {"num_pairs": 8}
    values = {
        "model.layers.L.conv_size": 3,
        "model.layers.L.expand_v": 1.0,
        "data.reader_options.num_pairs": 8,
        "optimizer.lr": config.optimizer.lr,
        "model.layers.Q.conv_size": None,
        "model.layers.L.conf_size": None,
        "optimiser.lr": None,
    }
    assert {name: tune._own(config, name) for name in values} == values


def test_gpus_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runs_module._gpus() == ["0", "1", "2"]
    for visible, expected in (("2,0", ["2", "0"]), ("1", []), ("", []), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert runs_module._gpus() == expected


def test_a_full_disk_ends_the_search_and_other_errors_a_run(tmp_path, monkeypatch):
    """So that the same command tries a run again that found no room."""

    def start(arguments, printed, threads, gpu):
        Path(printed).write_text(f"a line\nerror: {message}\n")
        os._exit(2)

    runs = Runs(SMALL, load_config(SMALL), tmp_path, processes=1, steps=4)
    forking = multiprocessing.get_context("fork")  # whose processes know of `start`
    monkeypatch.setattr(forking, "set_forkserver_preload", lambda _: None, raising=False)
    monkeypatch.setattr(runs_module, "start", start)
    monkeypatch.setattr(runs_module.multiprocessing, "get_context", lambda _: forking)
    message = "The loss is not finite."
    assert runs(0, 0, {}, 4).error == f"error: {message}"
    message = f"The checkpoint could not be written to x: {os.strerror(errno.ENOSPC)}; make room."
    with pytest.raises(ValueError, match=r"exit code 2: The checkpoint could not be .* No space left on device"):
        runs(1, 0, {}, 4)


def test_runs_start_from_an_imported_model(tmp_path):
    """A run's first checkpoint is that of the import, and a run without it cannot begin."""
    imported = tmp_path / "imported"
    (imported / "import").mkdir(parents=True)
    config = load_config([*SMALL, "--job.dump_folder", str(imported)])
    runs = Runs(SMALL, config, tmp_path / "runs", processes=1, steps=4)
    with pytest.raises(ValueError, match="no checkpoint of step 0 any more, from which runs would start"):
        runs(0, 0, {}, 4)
    first = imported / "checkpoints" / "step-00000000"
    first.mkdir(parents=True)
    (first / "weights").write_text("w")
    root = tmp_path / "run" / "checkpoints"
    for _ in range(2):
        runs._copy_imported(root)
        assert (root / "step-00000000" / "weights").read_text() == "w"
    assert (first / "weights").exists()


def test_a_file_of_another_search_is_kept(tmp_path):
    output = tmp_path / "found.json"
    recipe = tmp_path / "found.toml"
    recipe.write_text("# mine")
    with pytest.raises(ValueError, match=r"found\.toml exists, and would be replaced; name another --output"):
        tune.main([*SMALL, "--output", str(output), "--tune.optimizer.lr", "1e-3,2e-3"])
    assert recipe.read_text() == "# mine"
    recipe.unlink()
    for content, sentence in (
        (json.dumps({"plan": {}, "runs": []}), "belongs to another search; give its settings again"),
        ("{", "was not written by a search"),
    ):
        output.write_text(content)
        with pytest.raises(ValueError, match=sentence):
            tune.main([*SMALL, "--output", str(output), "--tune.optimizer.lr", "1e-3,2e-3"])
        assert output.read_text() == content
    with pytest.raises(ValueError, match=r"must end in \.json"):
        tune.main([*SMALL, "--output", str(tmp_path / "found"), "--tune.optimizer.lr", "1e-3,2e-3"])


def test_what_is_written(tmp_path, monkeypatch):
    """The files of a whole search whose runs are made up, cut off after three of them and resumed."""
    output, limit = tmp_path / "found.json", [3]

    def run(self, *of_run):
        limit[0] -= 1
        if limit[0] < 0:
            raise ValueError("A run ended with exit code -9.")
        return curve(*of_run)

    monkeypatch.setattr(Runs, "__call__", run)
    arguments = [*SMALL, "--training.steps", "64", "--output", str(output), "--optimizer.lr", "1e-3"]
    arguments += ["--tune.optimizer.lr", "x64"]
    with pytest.raises(ValueError, match="exit code -9"):
        tune.main(arguments)
    with FileLock(f"{output}.lock", timeout=0), pytest.raises(ValueError, match="Another search writes"):
        tune.main(arguments)
    assert runs_done(output) == 3
    assert "best" not in json.loads(output.read_text())
    limit[0] = 16
    tune.main(arguments)
    assert limit[0] == 0  # 13 + 4 + 2 in all
    assert json.loads(output.read_text())["best"]["values"] == {"optimizer.lr": "0.016"}
    found = load_config(["--job.config_file", str(output.with_suffix(".toml"))])
    assert found.optimizer.lr == 0.016
    assert found.data.dataset == "recall:parity"
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    tune.main(arguments)  # finished: nothing is run again


def start(output, *arguments):
    command = [sys.executable, "-m", "torchlmoe.tune", *MODEL, *arguments, "--output", str(output)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def runs_done(output):
    return len(json.loads(output.read_text())["runs"]) if output.exists() else 0


def kill_after(process, output, number):
    """Kills the process of a search, but none of its runs, as soon as the search has that many runs."""
    while runs_done(output) < number:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_a_search_with_runs_is_killed_and_resumed(tmp_path):
    """Two rates at two lengths; the files are there, and the best settings load."""
    output = tmp_path / "found.json"
    flags = f"{PARITY} --training.steps 8 --rounds 2 --keep 2 --tune.optimizer.lr 1e-3,1e-2".split()
    first = start(output, *flags)
    kill_after(first, output, 1)
    printed, _ = (second := start(output, *flags)).communicate()
    assert second.returncode == 0, printed
    record = json.loads(output.read_text())
    assert [(run["round"], run["steps"]) for run in record["runs"]] == [(0, 4), (0, 4), (1, 8), (1, 8)]
    assert printed.count("val_loss") == 4  # three runs that were left, and the best
    best = record["best"]["values"]["optimizer.lr"]
    assert load_config(["--job.config_file", str(output.with_suffix(".toml"))]).optimizer.lr == float(best)
    assert output.with_suffix(".png").exists()


@pytest.mark.long
@pytest.mark.parametrize("mixer", ["gated_deltanet", "hgrn2"])
def test_a_rate_is_found_from_thirty_times_off(mixer, tmp_path):
    """Within a factor of two of the best of a full sweep, at a third of its cost, although it is killed twice."""
    write_corpus(tmp_path)
    data = ["--data.dataset", str(tmp_path), "--data.cache_dir", str(tmp_path / "cache"), "--model.mixer", mixer]
    rates = ["--training.steps", "192", "--optimizer.lr", "3e-4", "--tune.optimizer.lr", "x64"]
    output = tmp_path / "found.json"
    kill_after(start(output, *data, *rates), output, 5)
    kill_after(start(output, *data, *rates), output, 14)
    printed, _ = (last := start(output, *data, *rates)).communicate()
    assert last.returncode == 0, printed
    sweep = tmp_path / "sweep.json"
    printed, _ = (whole := start(sweep, *data, *rates, "--rounds", "1")).communicate()
    assert whole.returncode == 0, printed
    found, full = json.loads(output.read_text()), json.loads(sweep.read_text())
    assert found["steps"] < full["steps"] / 3
    assert 0.5 <= float(found["best"]["values"]["optimizer.lr"]) / float(full["best"]["values"]["optimizer.lr"]) <= 2
    assert 15 <= float(full["best"]["values"]["optimizer.lr"]) / 3e-4 <= 64  # the start is that far off
