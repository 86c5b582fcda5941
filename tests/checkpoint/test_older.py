"""A checkpoint and an export of version 0.1 still open, and the run continues.

`tests/fixtures/version_0.1` holds a checkpoint of step 2, its export, the flags and the text of the run, and the
figures of its next steps. Layers of four kinds: HGRN2, a mixture of memories, RWKV-7 with a dense MLP, attention; Muon.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from torchlmoe.checkpoint import open_model
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer

FOLDER = Path(__file__).parent.parent / "fixtures" / "version_0.1"


def test_a_run_resumes(tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "step-00000002", tmp_path / "run" / "checkpoints" / "step-00000002")
    monkeypatch.chdir(FOLDER)
    # The figures are of a CPU without bfloat16 products, which others round otherwise.
    monkeypatch.setattr(sys.modules["torchlmoe.optim.muon"], "cpu_lacks_bfloat16", lambda: True)
    flags = [*(FOLDER / "flags.txt").read_text().split(), "--training.steps", "4"]
    folders = ["--job.dump_folder", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "cache")]
    Trainer(load_config([*flags, *folders])).train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name, values in json.loads((FOLDER / "steps.json").read_text()).items():
        assert [record[name] for record in records[-2:]] == pytest.approx(values, rel=1e-5)


def test_weights_open():
    (saved, _, tokenizer), (exported, config, _) = open_model(FOLDER / "step-00000002"), open_model(FOLDER / "export")
    assert config.block_spec("R").feed_forward_options["mlp_dim"] is None
    states = saved.state_dict(), exported.state_dict()
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert tokenizer.decode(tokenizer.encode_batch(["1 and 2"])[0]) == "1 and 2"
