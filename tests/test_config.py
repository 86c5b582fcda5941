"""Settings from flavor, TOML and command line; every kind of bad setting is one sentence and exit code 2."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import torch

import train
from torchlmoe.config import combinations
from torchlmoe.config.batch import batch_sizes, check_degrees
from torchlmoe.config.idle import NEEDS, idle_settings
from torchlmoe.config.load import ConfigError, load_config, to_toml
from torchlmoe.config.reference import markdown, sections
from torchlmoe.config.settings import Config
from torchlmoe.planning.world import as_on_gpu

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "train_configs").glob("*.toml"))


def load(text):
    return load_config(text.split())


def test_command_line_over_file_over_flavor(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[model]\nflavor = "a0.3b_2b"\nnum_heads = 4\ndim = 64\n[training]\nsteps = 3\n')
    config = load(f"--job.config_file {file} --model.dim=32 --training.steps 5 --training.steps 7")
    assert (config.model.dim, config.model.num_heads, config.model.num_layers) == (32, 4, 12)
    assert (config.training.steps, config.moe.expert_dim) == (7, 896)


def test_paths_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ("job.dump_folder", "data.dataset", "data.validation_dataset", "data.tokenizer", "data.cache_dir")
    config = load(" ".join(f"--{name} ~/x" for name in names))
    values = [getattr(getattr(config, table), key) for table, key in (name.split(".") for name in names)]
    assert values == ["/home/me/x"] * 5
    assert load("--data.dataset org/name --data.tokenizer embedded").data.dataset == "org/name"


def test_values_are_read_as_toml():
    config = load("--metrics.plot false --optimizer.lr 1 --data.tokenizer 12 --job.debug --moe.capacity_factor=1.25")
    assert (config.metrics.plot, config.optimizer.lr, config.data.tokenizer) == (False, 1, "12")
    assert (config.job.debug, config.moe.capacity_factor) == (True, 1.25)


def test_mixer_is_short_for_the_blocks_named_l(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[model.layers.L]\nmixer = "gla"\n')
    assert load(f"--job.config_file {file} --model.mixer bla").model.layers["L"]["mixer"] == "bla"
    assert load(f"--job.config_file {file} --model.layers.L.expand_k 1").model.layers["L"]["expand_k"] == 1


def test_a_later_mixer_of_the_letter_counts_and_round_trips(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[model]\nmixer = "gated_deltanet"\n')
    config = load(f"--job.config_file {file} --model.layers.L.mixer gla")
    assert config.model.mixer == config.model.layers["L"]["mixer"] == "gla"
    file.write_text(to_toml(config))
    again = load(f"--job.config_file {file}")
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_a_later_source_may_take_away_what_an_earlier_setting_needs(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[optimizer]\nname = "muon"\nmatrix_lr = 0.02\n[model]\nmixer = "gla"\n')
    config = load(f"--job.config_file {file} --optimizer.name adamw --model.layer_pattern N")
    assert (config.optimizer.matrix_lr, config.model.mixer) == (None, None)
    with pytest.raises(ConfigError, match=r"matrix_lr = 0.1 has no effect with"):
        load(f"--job.config_file {file} --optimizer.name adamw --optimizer.matrix_lr 0.1")
    file.write_text(to_toml(config))
    assert load(f"--job.config_file {file}").optimizer == config.optimizer
    file.write_text("[optimizer]\nmatrix_lr = 0.02\n")
    with pytest.raises(ConfigError, match=r"matrix_lr = 0.02 has no effect with"):
        load(f"--job.config_file {file} --training.steps 3")


@pytest.mark.parametrize(
    ("steps", "text"),
    [(5, "5\ntraining.seed = 3"), (5, "5 # of 7"), (5, "5, other = 7"), (5, "5 }\n[x]\ny = { a = 1"), (5, "5,")],
)
def test_what_follows_a_value_is_not_lost(steps, text):
    with pytest.raises(ConfigError, match=r"training\.steps = '5") as error:
        load_config(["--training.steps", text])
    assert repr(text) in str(error.value)
    assert load_config(["--training.steps", f" {steps}\n"]).training.steps == steps


def test_fewer_steps_shorten_the_warmup_of_an_earlier_source(tmp_path, caplog):
    debug = f"--job.config_file {ROOT / 'train_configs' / 'debug.toml'} --training.steps"
    assert load(f"{debug} 500").lr_scheduler.warmup_steps == 40
    assert not caplog.text
    assert load(f"{debug} 20").lr_scheduler.warmup_steps == 1
    assert (
        "lr_scheduler.warmup_steps is 1 in place of 40, in proportion to training.steps = 20 in place of" in caplog.text
    )
    with pytest.raises(ConfigError, match=r"warmup_steps = 30 is more than training\.steps = 20"):
        load(f"{debug} 20 --lr_scheduler.warmup_steps 30")
    file = tmp_path / "settings.toml"
    file.write_text("[lr_scheduler]\nwarmup_steps = 50\n")
    assert load(f"--job.config_file {file} --training.steps 20").lr_scheduler.warmup_steps == 10


# What has an effect whatever other settings are, or is refused by the layer that it is for.
ALWAYS = {
    "job": "config_file dump_folder custom_modules print_config debug",
    "model": "name flavor layer_pattern vocab_size dim num_layers norm norm_eps init_std tie_embeddings "
    "loss_chunk_size embedding_norm embedding_multiplier logit_divisor "
    "layers",
    "data": "dataset reader_options text_column train_split validation_split num_prefetch mixture",
    "training": "steps seq_len local_batch_size global_batch_size seed dtype loss loss_options max_norm "
    "non_finite deterministic device",
    "optimizer": "name options lr beta1 beta2 eps weight_decay",
    "lr_scheduler": "warmup_steps decay min_lr_factor",
    "checkpoint": "enable",
    "validation": "enable",
    "metrics": "log_freq tensorboard plot peak_tflops",
    "profiling": "enable",
    "float8": "enable experts",
    "compile": "enable",
    "activation_checkpoint": "mode",
    "parallelism": "data_parallel_replicate_degree data_parallel_shard_degree tensor_parallel_degree "
    "pipeline_parallel_degree context_parallel_degree timeout_seconds",
}


def test_every_setting_has_an_effect_or_says_what_it_needs():
    always = {f"{table}.{key}" for table, keys in ALWAYS.items() for key in keys.split()}
    tables = dataclasses.fields(Config)
    every = {f"{table.name}.{key.name}" for table in tables for key in dataclasses.fields(table.default_factory)}
    needy = combinations.NEEDS.keys() | NEEDS.keys() | {"optimizer.matrix_lr", "optimizer.momentum"}
    assert every == always | needy
    assert not always & needy


MIXTURE = """[{dataset = 'a/b', weight = 3}, {dataset = './c/d/', weight = 1, name = "x", max_tokens = 9}]"""


def test_mixtures(tmp_path):
    arguments = ["--data.mixture", MIXTURE, "--data.validation_dataset", "v"]
    config = load_config(arguments)
    assert [(source.label, source.weight, source.max_tokens) for source in config.data.mixture] == [
        ("b", 3, None),
        ("x", 1, 9),
    ]
    file = tmp_path / "settings.toml"
    file.write_text(to_toml(config))
    assert load(f"--job.config_file {file}").data == config.data
    for mixture, others, sentence in (
        (MIXTURE, ["--data.dataset", "z"], r"data\.dataset = 'z' and its .* have no effect with data\.mixture"),
        (MIXTURE, [], r"needs a data\.validation_dataset, or validation\.enable = false"),
        (MIXTURE.replace('"x"', "'b'"), arguments[2:], "two sources named 'b'"),
        (
            MIXTURE.replace("name", "nam"),
            arguments[2:],
            r"data\.mixture\.1\.nam is not a setting; the nearest is name\.",
        ),
        (MIXTURE.replace("weight = 1", "weight = -1"), arguments[2:], r"data\.mixture\.1\.weight = -1 is not valid"),
        ("[{weight = 1}]", arguments[2:], r"data\.mixture\.0\.dataset is missing"),
        ("[{dataset = 'a', weight = 0}]", arguments[2:], "only sources with weight = 0: give at least one"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_config(["--data.mixture", mixture, *others])
    with pytest.raises(ConfigError, match=r"data\.writer = 1 has no effect with data\.num_writers = 1"):
        load("--data.writer 1")


IDLE = {
    "--model.layers.L.mlp dense --model.layers.N.mlp dense --moe.top_k 3 --moe.expert_dim 8": [
        "moe.top_k",
        "moe.expert_dim",
    ],
    "--model.layers.L.mlp dense --model.layers.N.mlp dense --parallelism.expert_parallel_degree 2": [
        "parallelism.expert_parallel_degree"
    ],
    "--model.mlp_dim 8": ["model.mlp_dim"],
    "--model.mlp_dim 8 --model.layers.L.mlp dense": [],
    "--model.layer_pattern L --model.rope_scaling.type default": ["model.rope_scaling"],
    "--model.mixer s4 --model.layer_pattern L --model.num_heads 5 --model.rope_base 5.0": [
        "model.num_heads",
        "model.rope_base",
    ],
    "--data.dataset_config x": ["data.dataset_config"],
    "--data.dataset_config x --data.dataset owner/name": [],
    "--data.validation_fraction 0.5 --data.validation_dataset x": ["data.validation_fraction"],
    "--validation.enable false --validation.interval 5 --data.validation_max_tokens 9": [
        "data.validation_max_tokens",
        "validation.interval",
    ],
    "--checkpoint.interval 5 --checkpoint.async_mode async": ["checkpoint.interval", "checkpoint.async_mode"],
    "--model.flavor a1b_7b --model.layers.L.mlp dense": [],  # the flavor's experts, which nobody asked for
}


@pytest.mark.parametrize(("arguments", "idle"), IDLE.items())
def test_idle_settings_are_said(arguments, idle):
    assert list(idle_settings(load(arguments))) == idle


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_no_idle_settings(recipe):
    assert not idle_settings(load(f"--job.config_file {recipe}"))


def test_every_number_has_limits():
    """On both sides: neither too small nor too large for float32. Zero is a limit for what zero switches off.

    A number below zero has limits as its amount has.
    """
    for _, settings in sections():
        for setting in settings:
            if setting.kind.startswith("float "):
                lower, upper = setting.kind.removeprefix("float ").split(", ")
                if upper.startswith("<= -"):
                    lower, upper = f">= {upper[4:]}", f"<= {lower[4:]}"
                assert lower in (">= 0", "> 1") or (lower.startswith(">= ") and float(lower[3:]) >= 1e-20), setting
                assert upper == "< 1" or float(upper.removeprefix("<= ")) <= 1e12, setting


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_resolved_settings_round_trip(recipe, tmp_path):
    config = load(f"--job.config_file {recipe}")
    written = tmp_path / "config.toml"
    written.write_text(to_toml(config))
    again = load(f"--job.config_file {written}")
    again.job.config_file = config.job.config_file
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


BAD = {
    "--model.layer_patern LL": "model.layer_patern is not a setting; the nearest is layer_pattern.",
    "--modl.dim 3": "[modl] is not a table of settings; the nearest is model.",
    "--training.steps abc": "training.steps = 'abc' is not valid: it should be a valid integer.",
    "--training.steps 0": "training.steps = 0 is not valid: it should be greater than or equal to 1.",
    "--training.steps 2.5": "training.steps = 2.5 is not valid",
    "--optimizer.lr nan": "optimizer.lr = nan is not valid",
    "--training.dtype float16": "it should be 'float32', 'bfloat16', 'float64' or 'auto'.",
    "--model.flavor debg": "model.flavor = 'debg' is unknown; the nearest is debug.",
    "--model.flavor [1]": "model.flavor = [1] is unknown; choose one of debug",
    "--model.dim 9999999999999999999": "it should be less than or equal to 1000000.",
    "--model.dim 9999999999999999999999999": "model.dim does not fit in 64 bits; give a smaller number.",
    f"--model.dim {'9' * 5000}": "(5,002 characters) is not valid: it should be a valid integer.",
    f"--model.dim 0x{'9' * 5000}": "model.dim does not fit in 64 bits",
    f"--model.layers.L.{'a.' * 500}b 3": "model.layers.L.a.a.a.a.a.a.a = {...} is nested too deeply",
    f"--model.layers.L.inner_options {'[' * 600}": "model.layers.L.inner_options is not a setting",
    "--parallelism.timeout_seconds 1e30": "it should be less than or equal to 2592000.",
    "--data.text_column \udcff": "data.text_column = '\\udcff' is not valid: it should be UTF-8 without NUL.",
    "--job.dump_folder=": "job.dump_folder = '' is not valid: it should not be empty (an unset shell variable is);",
    "--job.config_file=": "job.config_file = '' is not valid: it should not be empty",
    "--job.config_file.x 3": "job.config_file = {'x': 3} is not valid: it should be a valid string.",
    "--job.config_file /dev/zero": "job.config_file cannot be used: /dev/zero is not a regular file.",
    "--data.dataset=": "data.dataset = '' is not valid: it should not be empty",
    "--data.validation_dataset=": "data.validation_dataset = '' is not valid: it should not be empty",
    "--data.tokenizer=": "data.tokenizer = '' is not valid: it should not be empty",
    "--data.cache_dir ~nobody-of-that-name/x": "it should begin with the name of a user who has a home folder",
    "--model.num_layers 1000000000000": "it should be less than or equal to 10000.",
    "--model.layers.L.mixer [1]": "model.layers.L.mixer = [1] is unknown; choose one of",
    "--model.mixer mom --model.layers.L.inner [1]": "model.layers.L.inner = [1] is not valid: it should be a valid str",
    "--model.layers.L.norm_eps -1": "norm_eps = -1 is not valid: it should be greater than or equal to 1e-12.",
    "--model.layers.L.norm_eps nan": "model.layers.L.norm_eps = nan is not valid: it should be ",
    "--model.layers.L.init_std -1": "init_std = -1 is not valid: it should be greater than or equal to 1e-06.",
    "--model.layers.L.init_std inf": "model.layers.L.init_std = inf is not valid: it should be a finite number.",
    "--model.mixer glaa": "model.layers.L.mixer = 'glaa' is unknown; the nearest is gla.",
    "--model.mixer mom --model.layers.L.inner glaa": "model.layers.L.inner = 'glaa' is unknown; the nearest is gla.",
    "--model.mixer mom --model.layers.L.inner gla --model.layers.L.inner_options.gate_rnk 3": (
        "model.layers.L.inner_options.gate_rnk is not a setting; the nearest is gate_rank."
    ),
    "--model.layers.L.convsize 3": "model.layers.L.convsize is not a setting; the nearest is conv_size.",
    "--model.layers.L.conv_size x": "model.layers.L.conv_size = 'x' is not valid: it should be a valid integer.",
    "--model.layers.L.mlp sparse": "model.layers.L.mlp = 'sparse' is unknown; choose from moe, dense, none.",
    "--model.layers.LL.mixer bla": "[model.layers.LL] must be named by one letter",
    "--model.layer_pattern LX": "names 'X', which has no table; add [model.layers.X] with a mixer.",
    "--model.layers.X.mlp moe": "model.layers.X.mixer is missing; choose one of",
    "--model.layers 3": "model.layers.layers = 3 must be a table",
    "--model.mixer bla --model.layers.L.mixer gla": "model.mixer = 'bla' contradicts model.layers.L.mixer = 'gla'",
    "--model.mixer bla --model.layer_pattern N": "model.mixer = 'bla' has no effect with model.layer_pattern = 'N': ",
    "--optimizer.matrix_lr 1e-2": "matrix_lr = 0.01 has no effect with optimizer.name = 'adamw': it needs 'muon';",
    "--optimizer.momentum 0.9": "optimizer.momentum = 0.9 has no effect with optimizer.name = 'adamw'",
    "--moe.aux_loss_weight 1 --moe.balance none": "aux_loss_weight = 1.0 has no effect with moe.balance = 'none'",
    "--moe.aux_loss_weight 1 --moe.balance loss_free": "or leave aux_loss_weight unset.",
    "--moe.aux_loss_scope global_batch --moe.balance none": "moe.aux_loss_scope = 'global_batch' has no effect with",
    "--moe.bias_update_rate 1": "it needs 'loss_free'; set that, or leave bias_update_rate unset.",
    "--parallelism.pipeline_parallel_schedule GPipe": "= 'GPipe' is not valid: it should be '1F1B' or 'Inter",
    "--parallelism.pipeline_parallel_schedule Interleaved1F1B": "has no effect with parallelism.pipeline",
    "--parallelism.pipeline_parallel_split 1,2": "split = [1, 2] has no effect with parallelism.pipeline",
    "--parallelism.pipeline_parallel_split one": "pipeline_parallel_split = ",
    "--parallelism.lsm_context_parallel ring": "= 'ring' has no effect with parallelism.context_parallel_degree = 1",
    "--parallelism.attention_context_parallel ulysses": "it needs 2 or more; set that, or leave attention_c",
    "--parallelism.pipeline_parallel_degree 0": "pipeline_parallel_degree = 0 is not valid",
    "--float8.enable true --training.dtype float64": "needs training.dtype = 'bfloat16' or 'float32'; it is 'float64'.",
    "--float8.experts mxfp8 --training.dtype float64": "float8.experts = 'mxfp8' needs training.dtype = 'bfloat16' or",
    "--activation_checkpoint.mode some": "it should be 'none', 'selective' or 'full'.",
    "--profiling.enable true --profiling.num_steps 9 --profiling.interval 9": (
        "num_steps = 9 must be less than profiling.interval = 9"
    ),
    "--profiling.num_steps 9": "profiling.num_steps = 9 has no effect with profiling.enable = false",
    "--float8.recipe rowwise": "float8.recipe = 'rowwise' has no effect with float8.enable = false",
    "--moe.group_score top2_sum": "no effect with moe.num_expert_groups = 1: it needs 2 or more; set that",
    "--lr_scheduler.decay_fraction 0.5": "no effect with lr_scheduler.decay = 'cosine': it needs 'wsd'; set that",
    "--model.init_std 1e30": "init_std = 1e+30 is not valid: it should be less than or equal to 10.",
    "--optimizer.eps 1e-300": "optimizer.eps = 1e-300 is not valid: it should be greater than or equal to 1e-20.",
    "--moe.capacity_factor 1e-300": "it should be greater than or equal to 0.01.",
    "--training.max_norm 1e-300": "training.max_norm = 1e-300 would clip every gradient to zero; 0 is for no clipping.",
    "--lr_scheduler.warmup_steps 30 --training.steps 20": "warmup_steps = 30 is more than training.steps = 20",
    "--lr_scheduler.warmup_steps 1000": "warmup_steps = 1000 is more than training.steps = 100",
    "--checkpoint.load_step 3": "checkpoint.load_step = 3 has no effect with checkpoint.enable = false: it needs true",
    "--checkpoint.async_mode thread": "it should be 'disabled' or 'async'.",
    "steps": "'steps' is not a setting; write --table.key value (see --help).",
    "--model.dim": "--model.dim needs a value.",
    "--job.config_file nowhere.toml": "job.config_file = 'nowhere.toml' does not exist",
    "--job.config_file README.md": "job.config_file cannot be used: README.md is not TOML",
    "--training.steps.more 3": "training.steps = {'more': 3} is not valid",
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD.items())
def test_bad_settings(arguments, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        load(arguments)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def context(degree, settings):
    return load(f"--parallelism.context_parallel_degree {degree} {settings}")


def test_degrees():
    check_degrees(load("--parallelism.data_parallel_replicate_degree 2"), 4)
    check_degrees(load("--parallelism.data_parallel_shard_degree 2 --parallelism.data_parallel_replicate_degree 2"), 4)
    check_degrees(context(4, "--training.local_batch_size 1"), 4)
    for name in ("data_parallel_replicate_degree", "context_parallel_degree"):
        with pytest.raises(ConfigError, match=rf"{name} = 3 .*does not divide the 4 ranks"):
            check_degrees(load(f"--parallelism.{name} 3"), 4)
    with pytest.raises(ConfigError, match=r"context_parallel_degree = 2 is 16, but there are 4 ranks"):
        check_degrees(load("--parallelism.data_parallel_shard_degree 8 --parallelism.context_parallel_degree 2"), 4)
    with pytest.raises(ConfigError, match=r"degree = 4 does not divide the 1 x 6 tokens of training.local_batch_size"):
        check_degrees(context(4, "--training.seq_len 6 --training.local_batch_size 1"), 4)
    with pytest.raises(ConfigError, match=r"= 4 does not divide the 3 x 6 tokens of validation.local_batch_size"):
        check_degrees(context(4, "--training.seq_len 6 --validation.local_batch_size 3"), 4)
    with pytest.raises(ConfigError, match=r"is 8, but there are 4 ranks"):
        check_degrees(load("--parallelism.data_parallel_shard_degree 8"), 4)
    with pytest.raises(ConfigError, match=r"data_parallel_shard_degree = 0 is impossible"):
        check_degrees(load("--parallelism.data_parallel_shard_degree 0"), 4)
    with pytest.raises(ConfigError, match=r"global_batch_size = 12 must be a multiple of .* 8 x 4 = 32"):
        check_degrees(load("--training.global_batch_size 12 --training.local_batch_size 8"), 4)
    with pytest.raises(ConfigError, match=r"global_batch_size = 6 must be a multiple of the 4 data ranks"):
        check_degrees(load("--training.global_batch_size 6"), 4)
    stages = "--parallelism.pipeline_parallel_degree 4 --training.local_batch_size 1"
    check_degrees(load(f"{stages} --training.global_batch_size 4"), 4)
    check_degrees(load(f"{stages} --training.global_batch_size 8"), 8)
    with pytest.raises(
        ConfigError, match=r"gives 3 of the 4 microbatches .* of 4 stages needs; set global_batch_size = 4\."
    ):
        check_degrees(load(f"{stages} --training.global_batch_size 3"), 4)
    with pytest.raises(ConfigError, match=r"on 2 data ranks gives 2 of the 4 micro.*; set global_batch_size = 8\."):
        check_degrees(load(f"{stages} --training.global_batch_size 4"), 8)
    with pytest.raises(ConfigError, match=r"gives 1 of the 4 .*; set local_batch_size = 3 or global_batch_size = 48\."):
        check_degrees(load("--parallelism.pipeline_parallel_degree 4 --training.global_batch_size 12"), 4)
    with pytest.raises(
        ConfigError, match=r"\[1, 2\] makes 3 stages, and 1F1B takes one for each of the 4 .* give 3 first"
    ):
        check_degrees(load(f"{stages} --parallelism.pipeline_parallel_split 1,2"), 4)
    interleaved = "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule Interleaved1F1B"
    check_degrees(load(f"{interleaved} --training.local_batch_size 1 --training.global_batch_size 4"), 2)
    with pytest.raises(
        ConfigError, match=r"\[1, 2\] makes 3 stages, and Inter.* takes 2 or more .* give 3 first .* or 5"
    ):
        check_degrees(load(f"{interleaved} --parallelism.pipeline_parallel_split [0,1,2]"), 2)
    with pytest.raises(ConfigError, match=r"gives 5 microbatches, which Inter.* in 2 equal rounds; set .* = 4\."):
        check_degrees(load(f"{interleaved} --training.local_batch_size 1 --training.global_batch_size 5"), 2)
    with pytest.raises(ConfigError, match=r"a multiple of 16 tokens at once; .* seq_len is 24"):
        check_degrees(load("--float8.enable true --training.seq_len 3"), 2)
    with pytest.raises(ConfigError, match=r"seq_len is 16, over context_parallel_degree = 2\."):
        check_degrees(context(2, "--float8.enable true --training.seq_len 2"), 2)
    heads = "--float8.enable true --training.seq_len 2 --parallelism.tensor_parallel_degree 2"
    check_degrees(load(heads), 2)
    with pytest.raises(ConfigError, match=r"seq_len is 16, over .* = 1 times tensor_parallel_degree = 2, for latent"):
        check_degrees(load(f"{heads} --moe.latent_dim 16"), 2)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [("", (8, 32)), ("--training.local_batch_size 2", (2, 8)), ("--training.global_batch_size 12", (3, 12))],
)
def test_batch_sizes_on_four_ranks(settings, sizes):
    assert batch_sizes(load(settings).training, 4) == sizes


def test_help_lists_every_setting(capsys):
    train.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for table in dataclasses.fields(Config):
        for field in dataclasses.fields(table.default_factory):
            assert f"--{table.name}.{field.name}" in text


def test_the_page_of_settings_is_that_of_the_code():
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == markdown() + "\n", "run: python -m torchlmoe.settings_reference > docs/settings.md"


def test_program_ends_with_one_sentence():
    command = [sys.executable, "train.py", "--training.stepps", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: training.stepps is not a setting; the nearest is steps.\n"


def test_print_config_is_toml(capsys):
    train.main(["--model.dim", "48", "--job.print_config", "true"])
    assert tomli.loads(capsys.readouterr().out)["model"]["dim"] == 48


@pytest.mark.parametrize(("has_instructions", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_auto_is_bfloat16_only_if_the_device_has_instructions_for_it(has_instructions, expected, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    training = load_config(["--training.dtype", "auto"]).training
    assert training.dtype_on("cpu") is expected
    assert training.dtype_on("cuda") is torch.bfloat16
    with as_on_gpu():
        assert training.dtype_on("cpu") is torch.bfloat16
    assert load_config(["--training.dtype", "float64"]).training.dtype_on("cpu") is torch.float64
