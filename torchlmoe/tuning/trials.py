"""Chooses the values to try: a grid of lists, or random draws from ranges."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Values = dict[str, str]  # setting -> value, as on the command line


@dataclass(frozen=True)
class Range:
    """Numbers from low to high. log: spaced by their logarithm. whole: rounded to integers."""

    low: float
    high: float
    log: bool
    whole: bool

    def at(self, share: float) -> str:
        """The number at a fraction `share` of the range, as text."""
        if self.log:
            number = float(self.low * (self.high / self.low) ** share)
        else:
            number = self.low + (self.high - self.low) * share
        return str(round(number)) if self.whole else f"{number:.6g}"


def choices(name: str, text: str, own: Any) -> list[str] | Range:
    """Returns the values that `--tune.<name> text` means.

    text: "a,b,c" is a list; "lo:hi" and "lo:hi:log" are ranges; "x16" is the recipe's own value times the powers of two
        from 1/16 to 16.
    own: the setting's value in the recipe.
    Raises ValueError for other texts.
    """
    if text.startswith("x") and text[1:].isdigit():
        if isinstance(own, bool) or not isinstance(own, (int, float)) or own == 0:
            raise ValueError(f"--tune.{name} {text} multiplies the recipe's value, which is {own!r}; give a list.")
        most = int(text[1:]).bit_length() - 1
        if most < 1:
            raise ValueError(f"--tune.{name} {text} tries one value; give x2 or more.")
        products = [own * 2.0**power for power in range(-most, most + 1)]
        if isinstance(own, int):
            return list(dict.fromkeys(str(max(1, round(product))) for product in products))
        return [f"{product:.6g}" for product in products]
    if ":" in text and "," not in text:
        low, _, rest = text.partition(":")
        high, _, kind = rest.partition(":")
        try:
            values_between = Range(float(low), float(high), kind == "log", isinstance(own, int))
        except ValueError:
            values_between = None
        if (
            values_between is None
            or kind not in ("", "log")
            or not (-math.inf < values_between.low < values_between.high < math.inf)
        ):
            raise ValueError(f"--tune.{name} {text} is not a range; write lo:hi or lo:hi:log with lo less than hi.")
        if values_between.log and values_between.low <= 0:
            raise ValueError(f"--tune.{name} {text} needs a logarithm; begin above 0.")
        return values_between
    values = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(values):
        raise ValueError(f"--tune.{name} {text!r} has an empty value; write a,b,c.")
    return values


def trials(choices_of: dict[str, list[str] | Range], num_trials: int, seed: int) -> list[Values]:
    """Returns all combinations of lists or, if there is a range, `num_trials` random draws.

    choices_of: setting -> result of `choices`. Draws are spread evenly: each of num_trials equal parts of a range, or
    of a list, has one draw, in a random order that is independent per setting. Equal draws are tried once.
    """
    if not any(isinstance(each, Range) for each in choices_of.values()):
        lists = [each for each in choices_of.values() if isinstance(each, list)]
        return [dict(zip(choices_of, combination, strict=True)) for combination in itertools.product(*lists)]
    rng = np.random.default_rng(seed)
    drawn: list[Values] = [{} for _ in range(num_trials)]
    for name, each in choices_of.items():
        shares = (rng.permutation(num_trials) + rng.random(num_trials)) / num_trials
        for values, share in zip(drawn, shares, strict=True):
            values[name] = each.at(share) if isinstance(each, Range) else each[int(share * len(each))]
    return [dict(pairs) for pairs in dict.fromkeys(tuple(values.items()) for values in drawn)]


def at_edge(tried: list[Values], best: Values) -> list[str]:
    """Returns the settings whose best value is the smallest or the largest of several numbers that were tried."""
    names = []
    for name, value in best.items():
        try:
            numbers = sorted({float(values[name]) for values in tried})
        except ValueError:
            continue
        if len(numbers) > 1 and float(value) in (numbers[0], numbers[-1]):
            names.append(name)
    return names
