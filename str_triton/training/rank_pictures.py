"""The report's pictures of a low-rank network, in the style of `pictures`."""

import math
from collections.abc import Sequence

import matplotlib

from str_triton.budget.rank_budget import MatrixBudget, RankBudget
from str_triton.training.metrics import Record
from str_triton.training.pictures import (
    BLUE,
    GREY,
    ORANGE,
    STYLE,
    epoch_axes,
    layer_colours,
    markers,
    name_lines,
    short,
    svg,
)


def rank_progress_pictures(epochs: Sequence[Record], name: str, label: str) -> list[str]:
    """Draw accuracy or bits per character, and the compact network's parameters, after each epoch.

    Args:
        name: "accuracy" or "bits_per_character".
        label: the label of the evaluation's line.
    """
    numbers = [record["epoch"] for record in epochs]
    if name == "accuracy":
        title = "Accuracy (%)"
        training, evaluated = ([100 * record[key] for record in epochs] for key in ("train_accuracy", "accuracy"))
    else:
        title = "Bits per character"
        training, evaluated = ([record[key] / math.log(2) for record in epochs] for key in ("train_loss", "loss"))
    with matplotlib.rc_context(STYLE):
        figure, axes = epoch_axes(title, legend_lines=2)
        axes.plot(numbers, training, color=GREY, label="training", **markers(epochs))
        axes.plot(numbers, evaluated, color=BLUE, label=label, **markers(epochs))
        name_lines(figure, axes)
        pictures = [svg(figure, f"{title} after each epoch")]
        figure, axes = epoch_axes("Parameters of the compact network", legend_lines=2)
        axes.plot(numbers, [record["params"] for record in epochs], color=ORANGE, **markers(epochs))
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        return [*pictures, svg(figure, "Parameters of the compact network after each epoch")]


def rank_picture(epochs: Sequence[Record], names: Sequence[str]) -> str:
    """Draw the rank of each matrix after each epoch in which it was factorized."""
    with matplotlib.rc_context(STYLE):
        figure, axes = epoch_axes("Rank", legend_lines=len(names))
        for name, label, colour in zip(names, short(names), layer_colours(len(names)), strict=True):
            own = [record for record in epochs if name in record["layers"]]
            values = [record["layers"][name]["rank"] for record in own]
            numbers = [record["epoch"] for record in own]
            axes.plot(numbers, values, color=colour, label=label, **markers(own))
        name_lines(figure, axes)
        axes.set_ylim(0, None)
        return svg(figure, "Rank of each matrix after each epoch")


def spectrum_pictures(epochs: Sequence[Record], budget: RankBudget) -> list[str]:
    """Draw the singular values and the threshold of each matrix after each epoch in which it was factorized."""
    with matplotlib.rc_context(STYLE):
        labels = short([row.name for row in budget.rows])
        return [_spectrum(epochs, row, label) for row, label in zip(budget.rows, labels, strict=True)]


def _spectrum(epochs: Sequence[Record], row: MatrixBudget, label: str) -> str:
    figure, axes = epoch_axes(f"{label}: {row.rank} of {row.max_rank}")
    own = [record for record in epochs if row.name in record["layers"]]
    numbers = [record["epoch"] for record in own]
    layers = [record["layers"][row.name] for record in own]
    # Only some values of a long spectrum are logged. The share of kept ones among them is rank / max_rank.
    size = min(len(layer["spectrum"]) for layer in layers)
    kept = math.ceil(size * row.rank / row.max_rank)
    for index in reversed(range(size)):
        values = [layer["spectrum"][index] for layer in layers]
        axes.plot(numbers, values, color=BLUE if index < kept else GREY, linewidth=0.9, **markers(own))
    if row.threshold is not None:
        thresholds = [layer["threshold"] for layer in layers]
        axes.plot(numbers, thresholds, color=ORANGE, linestyle="--", linewidth=1.6)
    axes.set_ylim(0, None)
    return svg(figure, f"Singular values of {row.name} after each epoch")
