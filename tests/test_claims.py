"""The harness of the claims: verdicts, resumption, pictures and the page, on figures that were made up."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.claims import page, record
from benchmarks.claims.page import CHECKS, draw
from benchmarks.claims.record import fill, mean_and_error, median_and_error, path_of, ratio_and_error
from benchmarks.claims.table import CLAIMS, HELD, NOT_HELD, UNDECIDED, verdict

MACHINE = {"gpu": None, "cpu": "a CPU", "torch": "2.0", "threads": 2, "date": "2026-01-02T00:00:00"}


def made_up(name, figures):
    """All rows of a claim. figures: unit -> measured figures."""
    return [{"unit": unit, "machine": MACHINE, **figures(unit)} for unit in CHECKS[name].units()]


def speeds(unit, ratio=1.0, spread=0.01):
    longest = unit["length"] == 4096
    mean = 1000 * (ratio if longest and unit["mixer"] != "attention" else 0.5 if longest else 1.0)
    return {
        "tokens_per_second": mean,
        "all_tokens_per_second": [mean * (1 - spread), mean, mean * (1 + spread)],
        "memory_gib": 1.0,
    }


def decoded(unit, grows=False, times=1.0):
    factors = {131072: 10.0 if unit["mixer"] == "attention" else times}
    return {
        "points": [
            {
                "position": position,
                "milliseconds": factors.get(position, 1.0),
                "all_milliseconds": [
                    factors.get(position, 1.0) * (1 + (wobble if position == 1024 else -wobble))
                    for wobble in (-1e-3, 0, 1e-3)
                ],
                "cache_mib": float(position) if grows or unit["mixer"] == "attention" else 1.0,
            }
            for position in (1024, 4096, 16384, 65536, 131072)
        ]
    }


def recalled(unit, hybrid=0.9, spread=0.0):
    pure = 0.3 if unit["dim"] == 16 else 0.4
    mean = {"pure": pure, "softmax": 1.0}.get(unit["pattern"], hybrid)
    accuracy = mean + (spread if unit["seed"] % 2 else -spread)
    return {"points": [{"pairs": pairs, "accuracy": accuracy} for pairs in (4, 8, 15)], "state_bytes": 10}


def lost(unit, pure=4.0, hybrid=3.95, spread=0.001):
    mean = 3.97 if unit["model"] == "softmax" else hybrid if unit["model"].endswith("hybrid") else pure
    return {"val_loss": mean + (spread if unit["seed"] % 2 else -spread), "parameters": 1000}


def mixed(unit, gain=0.1, spread=0.001):
    mean = 4.0 - gain * (unit["feed_forward"] == "mixture")
    return {"val_loss": mean + (unit["seed"] - 1) * spread}


def test_a_rule_holds_on_all_of_a_range_or_not():
    assert verdict([(1.0, 0.1, 0.8), (2.0, 0.0, 2.0)]) == HELD
    assert verdict([(1.0, 0.3, 0.8), (2.0, 0.0, 2.0)]) == UNDECIDED
    assert verdict([(0.7, 0.3, 0.8), (2.0, 0.0, 2.0)]) == UNDECIDED
    assert verdict([(1.0, 0.3, 0.8), (1.0, 0.1, 2.0)]) == NOT_HELD
    assert verdict([(1.0, float("inf"), 0.8)]) == UNDECIDED


def test_errors():
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(2.0))
    assert mean_and_error([1.0])[1] == float("inf")
    assert median_and_error([1.0, 2.0, 3.0, 100.0, 2.5]) == (2.5, pytest.approx(49.5))
    many = [float(number) for number in range(100)] + [1e9]
    assert median_and_error(many) == (50.0, pytest.approx(10.0, abs=1))
    ratio, error = ratio_and_error([9.0, 10.0, 11.0], [4.0, 5.0, 6.0])
    assert ratio == 2
    assert error == pytest.approx(2 * (0.1**2 + 0.2**2) ** 0.5)


@pytest.mark.parametrize(
    ("name", "figures", "options", "expected"),
    [
        ("throughput", speeds, {}, HELD),
        ("throughput", speeds, {"ratio": 0.7}, NOT_HELD),
        ("throughput", speeds, {"ratio": 0.8, "spread": 0.1}, UNDECIDED),
        ("throughput", speeds, {"ratio": 0.45}, NOT_HELD),
        ("decoding", decoded, {}, HELD),
        ("decoding", decoded, {"grows": True}, NOT_HELD),
        ("decoding", decoded, {"times": 1.1}, NOT_HELD),
        ("decoding", decoded, {"times": 1.05}, UNDECIDED),
        ("recall", recalled, {}, HELD),
        ("recall", recalled, {"hybrid": 0.5}, NOT_HELD),
        ("recall", recalled, {"hybrid": 0.7, "spread": 0.1}, UNDECIDED),
        ("loss", lost, {}, HELD),
        ("loss", lost, {"pure": 4.1}, NOT_HELD),
        ("loss", lost, {"hybrid": 3.98}, NOT_HELD),
        ("loss", lost, {"spread": 0.1}, UNDECIDED),
        ("experts", mixed, {}, HELD),
        ("experts", mixed, {"gain": -0.1}, NOT_HELD),
        ("experts", mixed, {"gain": 0.01, "spread": 0.1}, UNDECIDED),
    ],
)
def test_verdicts(name, figures, options, expected):
    rows = made_up(name, lambda unit: figures(unit, **options))
    found, words = CHECKS[name].verdict(rows)
    assert found == expected, words
    assert words


def test_a_claim_that_was_cut_off_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "machine", lambda: MACHINE)
    units, measured, killed = [{"n": number} for number in range(5)], [], []

    def measure(unit):
        if unit["n"] == 3 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        measured.append(unit["n"])
        return {"square": unit["n"] ** 2}

    with pytest.raises(KeyboardInterrupt):
        fill("recall", units, measure, tmp_path)
    fill("recall", units, measure, tmp_path)
    assert measured == [0, 1, 2, 3, 4]
    assert [row["square"] for row in record.read("recall", tmp_path)["rows"]] == [0, 1, 4, 9, 16]
    monkeypatch.setitem(CLAIMS, "recall", replace(CLAIMS["recall"], sizes={"other": 1}))
    with pytest.raises(ValueError, match=r"was measured at other sizes than those of benchmarks/claims/table\.py"):
        fill("recall", units, measure, tmp_path)


def test_units_measured_at_the_same_time(tmp_path, monkeypatch):
    """Two at a time, each of which waits for the other; an error ends the call and keeps the rows of other units."""
    monkeypatch.setattr(record, "machine", lambda: MACHINE)
    units, both = [{"n": number} for number in range(4)], threading.Barrier(2, timeout=20)

    def measure(unit):
        both.wait()
        if unit["n"] == 2:
            raise RuntimeError("killed")
        return {"square": unit["n"] ** 2}

    with pytest.raises(RuntimeError, match="killed"):
        fill("recall", units, measure, tmp_path, processes=2)
    measured = {row["unit"]["n"]: row["square"] for row in record.read("recall", tmp_path)["rows"]}
    assert measured == {0: 0, 1: 1, 3: 9}


def test_pages_and_pictures_of_whole_and_partial_figures(tmp_path):
    makers = {"throughput": speeds, "decoding": decoded, "recall": recalled, "loss": lost}
    for name, maker in makers.items():
        rows = made_up(name, maker)
        rows = rows[: len(rows) // 2] if name == "loss" else rows
        sizes = json.loads(json.dumps(CLAIMS[name].sizes))
        path_of(name, tmp_path).write_text(json.dumps({"sizes": sizes, "rows": rows}))
        assert draw(name, tmp_path).read_bytes()[:4] == b"\x89PNG"
    assert draw("experts", tmp_path) is None
    text = page.page(tmp_path)
    assert text.count("**Verdict: held.** ") == 3
    assert "**Verdict: not run yet.** 26 of 52 parts are done." in text
    assert "**Verdict: not run yet.** 0 of 12 parts are done." in text
    assert (
        "accuracy, dim 16:\n\n| pattern | pairs 4 | pairs 8 | pairs 15 |\n|---|---|---|---|\n| pure | 0.3 | 0.3 | 0.3 |"
        in text
    )
    assert text.count("| held |") == 3
    assert text.count("| not run yet |") == 2


def test_the_page_is_what_the_figures_say():
    assert Path("docs/results.md").read_text() == page.page(), "run python -m benchmarks.claims page"
