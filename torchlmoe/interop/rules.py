"""Rules that convert tensors of another format to torchlmoe's and back: names on both sides, and invertible steps.

    table = [Rule("attn.qkv.weight", ("q_proj.weight", "k_proj.weight", "v_proj.weight"), Split(3))]
    ours = convert(theirs, table)
    theirs = convert(ours, table, reverse=True)

A table is a list of rules in any order. `prefixed` makes the table of a model from that of a layer.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from torchlmoe.interop.steps import Misfit, Step


class Rule:
    """Converts tensors of the other format to tensors of torchlmoe by steps, which are applied in order.

    theirs, ours: one or more names in the other format, and in torchlmoe. A `*` between dots stands for a number, such
    as the index of a layer. If one name of a rule has a `*`, all of them need one, and the rule applies to every number
    that occurs. A rule without steps renames a tensor.

    Raises ValueError if the steps do not make as many tensors as there are names.
    """

    def __init__(self, theirs: str | Sequence[str], ours: str | Sequence[str], *steps: Step):
        self.theirs = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        self.ours = (ours,) if isinstance(ours, str) else tuple(ours)
        self.steps = steps
        count = len(self.theirs)
        for step in steps:
            if step.num_before not in (None, count):
                raise ValueError(f"{self}: {step} takes {step.num_before} tensors, not {count}.")
            count = step.num_after or count
        if count != len(self.ours):
            raise ValueError(f"{self}: the steps give {count} tensors, not {len(self.ours)}.")
        if {name.count("*") for name in self.theirs + self.ours} not in ({0}, {1}):
            raise ValueError(f"{self}: each name must have one *, or none of them any.")

    @property
    def numbered(self) -> bool:
        """Whether the names have a `*`."""
        return "*" in self.theirs[0]

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Convert tensors in the order of `theirs` to tensors in the order of `ours`.

        Raises ValueError that names the first tensor whose shape or dtype does not fit.
        """
        return self._run(self.theirs, [step.forward for step in self.steps], tensors)

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `forward`."""
        return self._run(self.ours, [step.backward for step in reversed(self.steps)], tensors)

    def renamed(self, theirs: Callable[[str], str], ours: Callable[[str], str]) -> Rule:
        """Return the same rule with names changed by two functions, one for each side."""
        return Rule([theirs(name) for name in self.theirs], [ours(name) for name in self.ours], *self.steps)

    def _run(self, names: Sequence[str], steps: Iterable[Callable], tensors: Sequence[Tensor]) -> list[Tensor]:
        found = list(tensors)
        for step in steps:
            count = len(found)
            try:
                found = step(found)
            except Misfit as misfit:
                # Steps keep the order of tensors, so the place in the list tells the place among the names.
                name = names[misfit.index * len(names) // count]
                raise ValueError(f"{name} must {misfit.need}: {misfit.remedy}.") from misfit
        return found

    def __repr__(self) -> str:
        return f"Rule({', '.join(self.theirs)} -> {', '.join(self.ours)})"


def prefixed(table: Iterable[Rule], theirs: str, ours: str) -> list[Rule]:
    """Return the table with a prefix added to the names of each side.

    For example "model.layers.3.self_attn." and "blocks.3.mixer.". With "model.layers.*.mlp." and
    "blocks.*.feed_forward." one table serves every layer. If layers have different kinds, add prefixes with the index
    of each layer instead, since a name such as blocks.*.mixer.o_proj.weight may belong to any kind.
    """
    return [rule.renamed(theirs.__add__, ours.__add__) for rule in table]


def convert(tensors: Mapping[str, Tensor], table: Iterable[Rule], *, reverse: bool = False) -> dict[str, Tensor]:
    """Convert tensors of the other format to torchlmoe's, or with `reverse` torchlmoe's to the other format.

    tensors: name -> tensor of any dtype and device, meta included. The result may share memory with them.

    Raises ValueError that names a tensor that is missing, that no rule or more than one rule uses, that two rules
    make, or whose shape or dtype does not fit. Names are checked before any tensor is made.
    """
    result: dict[str, Tensor] = {}
    for conversion in conversions(tensors, table, reverse=reverse):
        result.update(conversion([tensors[name] for name in conversion.sources]))
    return result


class Conversion(NamedTuple):
    """A rule in one direction. It makes the tensors `targets` from the tensors `sources`."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    run: Callable[[Sequence[Tensor]], list[Tensor]]

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the targets by name, from the sources in order. Raises ValueError like `convert`."""
        return dict(zip(self.targets, self.run(tensors), strict=True))


def conversions(names: Collection[str], table: Iterable[Rule], *, reverse: bool = False) -> list[Conversion]:
    """Return the conversions that `convert` applies to tensors with these names, in order.

    Raises ValueError like `convert`, except for shapes and dtypes.
    """
    numbers = _numbers_by_pattern(names)
    rules = [each for rule in table for each in _numbered(rule, numbers, reverse)]
    found = [
        Conversion(rule.ours, rule.theirs, rule.backward)
        if reverse
        else Conversion(rule.theirs, rule.ours, rule.forward)
        for rule in rules
    ]
    for conversion in found:
        for name in conversion.sources:
            if name not in names:
                targets = _few(conversion.targets)
                raise ValueError(f"{name} is missing, which {targets} must be made from: add it or drop its rule.")
    taken = _once("take", (conversion.sources for conversion in found))
    _once("give", (conversion.targets for conversion in found))
    left = [name for name in names if name not in taken]
    if left:
        raise ValueError(f"No rule takes {_few(left)}: add a rule to the table, or leave out what is not wanted.")
    return found


def _numbers_by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the numbers in names: a name with one number replaced by `*` -> the numbers at that place."""
    numbers = defaultdict(list)
    for name in names:
        for match in re.finditer(r"(?<![^.])\d+(?![^.])", name):
            numbers[f"{name[: match.start()]}*{name[match.end() :]}"].append(match[0])
    return numbers


def _numbered(rule: Rule, numbers: Mapping[str, list[str]], reverse: bool) -> list[Rule]:
    """Return the rule with `*` replaced by each number that occurs in names, or the rule itself if it has no `*`."""
    if not rule.numbered:
        return [rule]
    sources = rule.ours if reverse else rule.theirs
    found = sorted({number for source in sources for number in numbers.get(source, ())}, key=int)
    if not found:
        raise ValueError(f"{sources[0]} is missing for every number *: add the tensors or drop their rule.")
    fills = [lambda name, number=number: name.replace("*", number) for number in found]
    return [rule.renamed(fill, fill) for fill in fills]


def _once(verb: str, groups: Iterable[Sequence[str]]) -> set[str]:
    """Return the names of all groups. Raises ValueError if a name occurs twice."""
    counts = Counter(name for group in groups for name in group)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"Two rules {verb} {name}: leave one of them out.")
    return set(counts)


def _few(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
