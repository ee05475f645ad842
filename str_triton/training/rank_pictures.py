"""The report's pictures of a low-rank network, in the style of `pictures`."""

import math
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from str_triton.budget.rank_budget import RankBudget
from str_triton.training.metrics import Record
from str_triton.training.pictures import BLUE, GREY, LEGEND_LAYERS, ORANGE, STYLE, svg


def rank_progress_picture(epochs: Sequence[Record], name: str, label: str) -> str:
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
        figure = Figure((9.0, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        marker = {"marker": "o" if len(epochs) < 3 else None, "markersize": 4}
        left.plot(numbers, training, color=GREY, label="training", **marker)
        left.plot(numbers, evaluated, color=BLUE, label=label, **marker)
        left.legend()
        left.set_title(title)
        right.plot(numbers, [record["params"] for record in epochs], color=ORANGE, **marker)
        right.set_title("Parameters of the compact network")
        right.set_ylim(0, None)
        right.yaxis.set_major_formatter("{x:,.0f}")
        for axes in (left, right):
            _epochs(axes)
        return svg(figure)


def rank_picture(epochs: Sequence[Record], names: Sequence[str]) -> str:
    """Draw the rank of each matrix after each epoch in which it was factorized."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 3.4), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps["viridis"]
        for index, name in enumerate(names):
            own = [record for record in epochs if name in record["layers"]]
            values = [record["layers"][name]["rank"] for record in own]
            colour = colours(0.2 + 0.65 * index / max(1, len(names) - 1))
            marker = "o" if len(own) < 3 else None
            axes.plot([record["epoch"] for record in own], values, color=colour, label=name, marker=marker)
        if len(names) <= LEGEND_LAYERS:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set(ylabel="rank", ylim=(0, None))
        _epochs(axes)
        return svg(figure)


def spectrum_picture(epochs: Sequence[Record], budget: RankBudget) -> str:
    """Draw the singular values and the threshold of each matrix after each epoch in which it was factorized."""
    lines = -(-len(budget.rows) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 2.5 * lines), layout="constrained")
        grid = figure.subplots(lines, 2, squeeze=False).flatten()
        for axes, row in zip(grid, budget.rows, strict=False):
            own = [record for record in epochs if row.name in record["layers"]]
            numbers = [record["epoch"] for record in own]
            layers = [record["layers"][row.name] for record in own]
            marker = "o" if len(own) < 3 else None
            # Only some values of a long spectrum are logged. The share of kept ones among them is rank / max_rank.
            size = min(len(layer["spectrum"]) for layer in layers)
            kept = math.ceil(size * row.rank / row.max_rank)
            for index in reversed(range(size)):
                values = [layer["spectrum"][index] for layer in layers]
                colour = BLUE if index < kept else GREY
                axes.plot(numbers, values, color=colour, linewidth=0.9, marker=marker, markersize=3)
            if row.threshold is not None:
                thresholds = [layer["threshold"] for layer in layers]
                axes.plot(numbers, thresholds, color=ORANGE, linestyle="--", linewidth=1.6)
            axes.set_title(f"{row.name}: {row.rank} of {row.max_rank}")
            axes.set_ylim(0, None)
            _epochs(axes)
        for axes in grid[len(budget.rows) :]:
            axes.set_visible(False)
        return svg(figure)


def _epochs(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
