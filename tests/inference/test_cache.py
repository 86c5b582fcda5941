"""The cache of many rows: reset, copied, forked, resized, saved; prompts that share what they begin with; memory."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peak_bytes import PeakBytes
from tests.inference.test_generate import build
from torchlmoe.inference import cache as caches
from torchlmoe.inference import prefill
from torchlmoe.inference.cache import LENGTH, copy_rows, load_cache, new_cache, read, reset_rows, resized, save_cache
from torchlmoe.inference.generate import generate
from torchlmoe.inference.prefill import read_prompts, shared_runs
from torchlmoe.mixers import MIXERS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def tokens(num_rows, length, seed=0):
    return torch.randint(50, (num_rows, length), generator=torch.Generator().manual_seed(seed))


SHIFTED = "--model.layers.L.mlp_token_shift true --model.embedding_norm true --model.norm layer"
CASES = {mixer: f"--model.mixer {mixer}" for mixer in MIXERS} | {
    "shifted": f"--model.mixer rwkv7 {SHIFTED} --model.layers.N.mlp_token_shift true --model.layers.N.mlp dense",
    "shifted_alone": f"--model.layers.L.mixer none {SHIFTED}",
}


@pytest.mark.parametrize("pattern", ["L", "LN"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_decode_equals_the_forward_pass_with_rows_forked_and_reset_on_the_way(case, pattern, monkeypatch, tmp_path):
    """Ragged rows, read in pieces; rows forked, overwritten, reset, saved and moved to a larger cache before each goes
    its own way. Every logit is that of one forward pass over the row."""
    monkeypatch.setattr(caches, "PIECE", 5)
    model = build("--model.layer_pattern", pattern, *CASES[case].split())
    model.eval()
    rows = [[*row] for row in tokens(4, 9).tolist()]
    cache = new_cache(model, 4, 40)
    read(model, cache[:2], torch.tensor(rows[:2]))  # a slice shares the memory
    rows[2:] = [[], []]
    copy_rows(cache, [0, 0], cache, [2, 3])  # one row to many
    rows[2], rows[3] = list(rows[0]), list(rows[0])
    more = tokens(1, 6, seed=1)
    read(model, cache[3:], more)
    rows[3] += more[0].tolist()
    reset_rows(cache, [1])
    assert cache[LENGTH].tolist() == [9, 0, 9, 15]
    again = tokens(1, 3, seed=2)
    read(model, cache[1:2], again)
    rows[1] = again[0].tolist()
    save_cache(cache, tmp_path / "cache.safetensors", model)
    cache = load_cache(tmp_path / "cache.safetensors", model, max_length=20)
    cache = resized(cache, model, 30)[torch.tensor([3, 0, 1, 2, 3])]
    rows = [list(rows[index]) for index in (3, 0, 1, 2, 3)]
    logits = []
    steps = tokens(5, 8, seed=3)
    for step in steps.T:  # ragged, one token each
        logits.append(read(model, cache, step[:, None]))
    for index, (row, more) in enumerate(zip(rows, steps.tolist(), strict=True)):
        whole = model(torch.tensor([row + more]))[0, len(row) :]
        torch.testing.assert_close(torch.stack([step[index] for step in logits]), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("pattern", ["L", "LLLN"])
@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_256_greedy_tokens_in_float32(mixer, pattern):
    """Dense, so that no choice of experts can flip by rounding; ragged prompts, of which two share a beginning."""
    layers = sorted(set(pattern))
    dense = [argument for letter in layers for argument in (f"--model.layers.{letter}.mlp", "dense")]
    model = build(
        "--model.layer_pattern", pattern, "--model.mixer", mixer, "--model.num_layers", "4",
        "--model.init_std", "0.1", *dense, dtype=torch.float32,
    )  # fmt: skip
    model.eval()
    start = tokens(1, 70)[0].tolist()
    prompts = [start + tokens(1, 9, seed=1)[0].tolist(), start + tokens(1, 2, seed=2)[0].tolist(), [3], start[:17]]
    cache, logits = read_prompts(model, prompts, 79 + 256)
    rows, seen = [list(prompt) for prompt in prompts], []
    for _ in range(256):
        seen.append(logits)
        chosen = logits.argmax(1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)
        logits = read(model, cache, chosen[:, None])
    assert [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)] == generate(
        model, prompts, max_new_tokens=256
    )
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        whole = model(torch.tensor([row]))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack([step[index] for step in seen]), whole, rtol=1e-4, atol=1e-4)


def test_prompts_share_what_they_begin_with(monkeypatch):
    """Each shared run is read once; the continuations are those of each prompt alone."""
    monkeypatch.setattr(prefill, "MIN_SHARED", 4)
    model = build("--model.layer_pattern", "LN")
    start, other = tokens(2, 30).tolist()
    prompts = [[*start, 1, 2, 3], [*start, 1, 7], start, [*start, 5], start, [*start[:10], *other], other, [2]]
    numbers = []
    original = caches.read_pieces

    def counted(model, cache, read_tokens):
        numbers.append(read_tokens.numel())
        return original(model, cache, read_tokens)

    monkeypatch.setattr(caches, "read_pieces", counted)
    found = generate(model, prompts, max_new_tokens=6)
    # start in two runs (ten tokens, then twenty), what follows it, `other` twice, and the single token.
    assert sum(numbers) == 10 + 20 + (3 + 2 + 1) + 30 + 30 + 1
    assert found == [generate(model, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_every_prompt_ends_one_run_and_runs_spell_the_prompts():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(1, 150, (9,), generator=generator).tolist()
        # Two tokens alone in the last part, and long shared beginnings, so that all kinds of branches occur.
        prompts = [[0] * (length // 2) + torch.randint(2, (length - length // 2,), generator=generator).tolist() for length in lengths]  # fmt: skip # noqa: E501
        spelled = {}

        def walk(runs, before, prompts=prompts, spelled=spelled):
            for run in runs:
                text = before + prompts[run.prompt][run.start : run.end]
                assert len(text) == run.end > run.start
                for index in run.ending:
                    assert index not in spelled
                    spelled[index] = text
                walk(run.parts, text)

        walk(shared_runs(prompts), [])
        assert [spelled[index] for index in range(9)] == prompts


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba", "ttt", "rwkv7"])
@torch.no_grad()
def test_prefill_of_any_length_takes_the_same_memory(mixer, monkeypatch):
    monkeypatch.setattr(caches, "PIECE", 64)
    model = build("--model.layer_pattern", "L", "--model.mixer", mixer, dtype=torch.float32)
    model.eval()
    peaks = []
    for length in (256, 1024):
        text, cache = tokens(1, length), new_cache(model, 1, length)
        with PeakBytes(given=[text]) as peak:  # the text that is read may grow
            read(model, cache, text)
        peaks.append(peak.most)
    assert peaks[0] > 10_000
    assert peaks[1] <= 1.01 * peaks[0]


@pytest.fixture
def saved(tmp_path):
    model = build("--model.layer_pattern", "LN", dtype=torch.float32)
    model.eval()
    cache = new_cache(model, 2, 30)
    with torch.no_grad():
        read(model, cache, tokens(2, 11))
    path = tmp_path / "cache.safetensors"
    save_cache(cache, path, model)
    return model, cache, path


def refusal(path, model, **options):
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_cache(path, model, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_saved_cache_has_the_places_that_are_filled(saved):
    model, cache, path = saved
    loaded = load_cache(path, model)
    assert loaded["1", "k"].shape[1] == 11
    for name, tensor in loaded.items(True, True):
        whole = cache[name]
        assert torch.equal(tensor, whole if tensor.shape == whole.shape else whole[:, :11])
    assert load_cache(path, model, max_length=50)["1", "k"].shape[1] == 50


def test_a_cache_of_something_else_is_refused(saved, tmp_path):
    model, _, path = saved
    with torch.no_grad():
        trained = build("--model.layer_pattern", "LN", dtype=torch.float32)
        trained.head.norm.weight.mul_(1.001)
    for other in (
        trained,
        build("--model.layer_pattern", "NL", dtype=torch.float32),
        build("--model.layer_pattern", "LN"),
        # Equal weights, other settings.
        build("--model.layer_pattern", "LN", "--model.rope_base", "500.0", dtype=torch.float32),
    ):
        assert "was saved with another model" in refusal(path, other)
    assert "rows of 11 tokens; max_length = 5" in refusal(path, model, max_length=5)
    assert "as [2, 3, 32] of torch.float32, but needs [2, 3, 32] of torch.bfloat16" in refusal(
        path, model, dtype=torch.bfloat16
    )
    assert "is missing" in refusal(tmp_path / "nowhere", model)
    assert "is not a regular file" in refusal(tmp_path, model)


def test_a_damaged_cache_is_refused(saved, tmp_path):
    """One flipped bit, a file cut short, a file of something else."""
    model, _, path = saved
    content = path.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert "do not have the checksum" in refusal(damaged, model)
    damaged.write_bytes(content[:-9])
    assert "is not a safetensors file that can be read" in refusal(damaged, model)
    save_file(load_file(path), damaged)
    assert "does not hold a cache of this version" in refusal(damaged, model)


def test_a_row_that_does_not_fit_is_refused(saved):
    model, cache, _ = saved
    with pytest.raises(ValueError, match="A row of 11 tokens does not fit into a cache of max_length = 10"):
        resized(cache, model, 10)
    wider = build("--model.layer_pattern", "LN", "--model.dim", "64", dtype=torch.float32)
    with pytest.raises(ValueError, match="they are of different models"):
        copy_rows(cache, [0], new_cache(wider, 1, 30), [0])


def test_rows_that_have_ended_cost_nothing(monkeypatch):
    """A step takes the rows that are left, and they continue as they do alone."""
    model = build("--model.layer_pattern", "LN")
    prompts = [row.tolist()[: 3 + index] for index, row in enumerate(tokens(5, 9, seed=4))]
    whole = generate(model, prompts, max_new_tokens=12)
    lengths = [3, 12, 1, 5, 12]
    taken = [0] * 5
    sizes = []
    original = model.next_logits

    def counted(step_tokens, positions, cache):
        sizes.append(len(step_tokens))
        return original(step_tokens, positions, cache)

    def has_ended(row, token):
        taken[row] += 1
        return taken[row] == lengths[row]

    monkeypatch.setattr(model, "next_logits", counted)
    found = generate(model, prompts, max_new_tokens=12, has_ended=has_ended)
    assert found == [row[:length] for row, length in zip(whole, lengths, strict=True)]
    assert sizes == [4, 4, 3, 3] + [2] * 7
