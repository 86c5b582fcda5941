"""Plots the validation losses of a search from its JSON."""

from pathlib import Path
from typing import Any


def draw(record: dict[str, Any], path: Path) -> None:
    """Plots one panel per tuned setting, with a line or points per round. A star marks the best run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(record["plan"]["tried"][0])
    figure, axes = plt.subplots(
        1, len(names), figsize=(1 + 5 * len(names), 4.5), layout="constrained", squeeze=False, sharey=True
    )
    for name, axis in zip(names, axes[0], strict=True):
        tried = [values[name] for values in record["plan"]["tried"]]
        numbers = _numbers(tried)
        places = numbers or {value: index for index, value in enumerate(dict.fromkeys(tried))}
        for round_, steps in enumerate(record["plan"]["lengths"]):
            points = sorted(
                (places[run["values"][name]], run["val_loss"])
                for run in record["runs"]
                if run["round"] == round_ and run["val_loss"] is not None
            )
            axis.plot(*zip(*points, strict=True), "o-" if len(names) == 1 else "o", label=f"{steps:,} steps")
        axis.plot(places[record["best"]["values"][name]], record["best"]["val_loss"], "k*", markersize=14, label="best")
        if numbers and min(numbers.values()) > 0 and max(numbers.values()) / min(numbers.values()) >= 8:
            axis.set_xscale("log")
        if not numbers:
            axis.set_xticks(list(places.values()), list(places))
        axis.set(xlabel=name, ylabel="validation loss, nats per token" if axis is axes[0][0] else "")
        axis.grid(alpha=0.3)
    axes[0][-1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _numbers(values: list[str]) -> dict[str, float] | None:
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return None
