"""Rules from another format's tensors to torchlmoe's and back, as data: names on either side and steps between them.

    table = [Rule("attn.qkv.weight", ("q_proj.weight", "k_proj.weight", "v_proj.weight"), Split(3))]
    ours = convert(theirs, table)
    theirs = convert(ours, table, reverse=True)

A table is a list of rules in any order. One layer's table serves a model by `prefixed`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from torchlmoe.interop.steps import Misfit, Step


class Rule:
    """Converts the tensors `theirs` of the other format to the tensors `ours`, by `steps`, one after another.

    theirs, ours: one name or several. A `*` between dots stands for a number, such as that of a layer. If one name of a
    rule has a `*`, all of them need one, and the rule applies to every number found. A rule without steps renames.

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
        """Whether the names hold a `*`."""
        return "*" in self.theirs[0]

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in the order of `theirs` -> tensors in the order of `ours`.

        Raises ValueError with one sentence that names the tensor whose shape or dtype does not fit.
        """
        return self._run(self.theirs, [step.forward for step in self.steps], tensors)

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `forward`."""
        return self._run(self.ours, [step.backward for step in reversed(self.steps)], tensors)

    def renamed(self, theirs: Callable[[str], str], ours: Callable[[str], str]) -> Rule:
        """The rule with each name replaced by what the function of its side makes of it."""
        return Rule([theirs(name) for name in self.theirs], [ours(name) for name in self.ours], *self.steps)

    def _run(self, names: Sequence[str], steps: Iterable[Callable], tensors: Sequence[Tensor]) -> list[Tensor]:
        found = list(tensors)
        for step in steps:
            count = len(found)
            try:
                found = step(found)
            except Misfit as misfit:
                # Steps keep the order, so what stands in the middle of the list came from the middle of the names.
                name = names[misfit.index * len(names) // count]
                raise ValueError(f"{name} must {misfit.need}: {misfit.remedy}.") from misfit
        return found

    def __repr__(self) -> str:
        return f"Rule({', '.join(self.theirs)} -> {', '.join(self.ours)})"


def prefixed(table: Iterable[Rule], theirs: str, ours: str) -> list[Rule]:
    """The table with a prefix before the names of either side: "model.layers.3.self_attn." and "blocks.3.mixer.", say.

    With "model.layers.*.mlp." and "blocks.*.feed_forward." one table serves every layer. Where layers are of several
    kinds, give each layer its own numbers: a name of ours, as blocks.*.mixer.o_proj.weight, may belong to any kind.
    """
    return [rule.renamed(theirs.__add__, ours.__add__) for rule in table]


def convert(tensors: Mapping[str, Tensor], table: Iterable[Rule], *, reverse: bool = False) -> dict[str, Tensor]:
    """Tensors by their names in the other format -> tensors by their names here; with `reverse` the other way.

    The tensors may be of any dtype and device, meta included, and may share memory with the result.

    Raises ValueError with one sentence that names a tensor that is missing, that no rule or more than one rule takes,
    that two rules give, or whose shape or dtype does not fit. Names are checked before any tensor is made.
    """
    result: dict[str, Tensor] = {}
    for conversion in conversions(tensors, table, reverse=reverse):
        result.update(conversion([tensors[name] for name in conversion.sources]))
    return result


class Conversion(NamedTuple):
    """One rule, applied in one direction to the tensors `sources`, which gives the tensors `targets`."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    run: Callable[[Sequence[Tensor]], list[Tensor]]

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The targets, from the sources in their order. Raises ValueError as `convert` does."""
        return dict(zip(self.targets, self.run(tensors), strict=True))


def conversions(names: Collection[str], table: Iterable[Rule], *, reverse: bool = False) -> list[Conversion]:
    """What `convert` does to tensors of these names, one step after another.

    Raises ValueError as `convert` does, but for shapes and dtypes.
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
    """For each name with one of its numbers made `*`, the numbers that stand there."""
    numbers = defaultdict(list)
    for name in names:
        for match in re.finditer(r"(?<![^.])\d+(?![^.])", name):
            numbers[f"{name[: match.start()]}*{name[match.end() :]}"].append(match[0])
    return numbers


def _numbered(rule: Rule, numbers: Mapping[str, list[str]], reverse: bool) -> list[Rule]:
    """The rule once for each number of which there is any of its tensors; once as it is, if it has no `*`."""
    if not rule.numbered:
        return [rule]
    sources = rule.ours if reverse else rule.theirs
    found = sorted({number for source in sources for number in numbers.get(source, ())}, key=int)
    if not found:
        raise ValueError(f"{sources[0]} is missing for every number *: add the tensors or drop their rule.")
    fills = [lambda name, number=number: name.replace("*", number) for number in found]
    return [rule.renamed(fill, fill) for fill in fills]


def _once(verb: str, groups: Iterable[Sequence[str]]) -> set[str]:
    """All names of all groups. Raises ValueError if there is one twice."""
    counts = Counter(name for group in groups for name in group)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"Two rules {verb} {name}: leave one of them out.")
    return set(counts)


def _few(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
