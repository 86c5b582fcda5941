"""Imported models under layouts of gloo processes: they train as on one process, from the imported weights."""

import shutil
from pathlib import Path

from tests.interop.families import CASES, their_model
from tests.parallel.parity import assert_layouts_equal_one_process
from torchlmoe import import_model
from torchlmoe.config.load import load_config
from torchlmoe.data.tokenizer import load_tokenizer

LAYOUTS = {
    "heads_and_experts": "--parallelism.tensor_parallel_degree 2 --parallelism.expert_parallel_degree 2",
    "spans": "--parallelism.context_parallel_degree 2",
    "stages": "--parallelism.pipeline_parallel_degree 2",
}
FAMILIES = ["qwen3_next", "nemotron_h"]


def imported(name: str, folder: Path) -> str:
    """Imports a model whose words are those of the embedded tokenizer; returns the settings of a run that trains it."""
    tokenizer = load_tokenizer("embedded")
    sizes = dict(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.end_id)
    their_model(CASES[name][0], **CASES[name][1] | sizes).save_pretrained(folder / "theirs")
    (folder / "theirs/tokenizer.json").write_bytes(tokenizer.content)
    import_model.main(["--model", str(folder / "theirs"), "--output", str(folder / "run")])
    file = f"{folder}/run/import/config.toml"
    config = load_config(["--job.config_file", file])
    sizes = " ".join(f"--moe.{name} {getattr(config.moe, name)}" for name in ("num_experts", "top_k", "expert_dim"))
    num_layers = f"--model.num_layers {config.model.num_layers}"
    return f"--job.config_file {file} --checkpoint.interval 100 {num_layers} {sizes}"


def test_imported_models_train_under_layouts(corpus, tmp_path):
    variants = {name: imported(name, tmp_path / name) for name in FAMILIES}
    for layout in ("whole", *LAYOUTS):
        for name in variants:
            shutil.copytree(tmp_path / name / "run/checkpoints", tmp_path / layout / name / "checkpoints")
    layouts = {2: {layout: (variants, flags) for layout, flags in LAYOUTS.items()}}
    assert_layouts_equal_one_process(layouts, corpus, tmp_path, steps=2, float32=())
