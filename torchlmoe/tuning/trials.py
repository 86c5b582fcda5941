"""Which settings are tried: a grid of lists, or draws from ranges."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

Values = dict[str, str]  # setting -> value, as on the command line


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; by their logarithm if `log`, whole ones if `whole`."""

    low: float
    high: float
    log: bool
    whole: bool

    def at(self, share: float) -> str:
        """The number at a share, from 0 to 1, of the way."""
        if self.log:
            number = float(self.low * (self.high / self.low) ** share)
        else:
            number = self.low + (self.high - self.low) * share
        return str(round(number)) if self.whole else f"{number:.6g}"


def choices(name: str, text: str, own: Any) -> list[str] | Range:
    """What `--tune.<name> text` tries.

    text: "a,b,c" is a list; "lo:hi" and "lo:hi:log" a range; "x16" the recipe's own value times the powers of two from
        1/16 to 16.
    own: the setting's value in the recipe.
    Raises ValueError for anything else.
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
            found = Range(float(low), float(high), kind == "log", isinstance(own, int))
        except ValueError:
            found = None
        if found is None or kind not in ("", "log") or not found.low < found.high < float("inf"):
            raise ValueError(f"--tune.{name} {text} is not a range; write lo:hi or lo:hi:log with lo less than hi.")
        if found.log and found.low <= 0:
            raise ValueError(f"--tune.{name} {text} needs a logarithm; begin above 0.")
        return found
    values = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(values):
        raise ValueError(f"--tune.{name} {text!r} has an empty value; write a,b,c.")
    return values


def trials(given: dict[str, list[str] | Range], num_trials: int, seed: int) -> list[Values]:
    """All combinations of lists; or, if there is a range among them, `num_trials` draws.

    The draws of a range are spread evenly: one in each of num_trials equal parts of it, in a separate random order.
    """
    if not any(isinstance(each, Range) for each in given.values()):
        lists = [each for each in given.values() if isinstance(each, list)]
        return [dict(zip(given, combination, strict=True)) for combination in itertools.product(*lists)]
    rng = np.random.default_rng(seed)
    drawn: list[Values] = [{} for _ in range(num_trials)]
    for name, each in given.items():
        shares = (rng.permutation(num_trials) + rng.random(num_trials)) / num_trials
        for values, share in zip(drawn, shares, strict=True):
            values[name] = each.at(share) if isinstance(each, Range) else each[int(share * len(each))]
    return [dict(pairs) for pairs in dict.fromkeys(tuple(values.items()) for values in drawn)]


def at_edge(tried: list[Values], best: Values) -> list[str]:
    """The settings whose best value is the smallest or the largest of several that were tried."""
    found = []
    for name, value in best.items():
        try:
            numbers = sorted({float(values[name]) for values in tried})
        except ValueError:
            continue
        if len(numbers) > 1 and float(value) in (numbers[0], numbers[-1]):
            found.append(name)
    return found
