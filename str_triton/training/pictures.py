"""The report's pictures, as SVG with the page's font and text colour, light or dark."""

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from str_triton.budget.budget import Budget, LayerBudget
from str_triton.files import percent
from str_triton.training.metrics import Record

BLUE, ORANGE, GREY = "#3f87cf", "#e07b39", "#9aa3ad"
TEXT = "#010203"  # a placeholder for the page's text colour, used nowhere else in a picture
LEGEND_LAYERS = 14
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def progress_picture(epochs: Sequence[Record]) -> str:
    """Draw accuracy and sparsity after each epoch."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 2.9), layout="constrained")
        accuracy, sparsity = figure.subplots(1, 2)
        for axes in (accuracy, sparsity):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        numbers = [record["epoch"] for record in epochs]
        marker = "o" if len(epochs) < 3 else None
        for key, colour, label in (("train_accuracy", GREY, "training"), ("accuracy", BLUE, "test")):
            values = [100 * record[key] for record in epochs]
            accuracy.plot(numbers, values, color=colour, label=label, marker=marker, markersize=4)
        accuracy.legend(loc="lower right")
        accuracy.set(title="Accuracy (%)", xlabel="epoch")
        values = [100 * record["sparsity"] for record in epochs]
        sparsity.plot(numbers, values, color=ORANGE, marker=marker, markersize=4)
        sparsity.set(title="Sparsity (% of the weights that are zero)", xlabel="epoch", ylim=(-2, 102))
        return svg(figure)


def sparsity_picture(budget: Budget) -> str:
    """Draw the sparsity of each covered layer, and the network's sparsity as a line."""
    rows = budget.covered_rows
    with matplotlib.rc_context(STYLE):
        figure, axes = _layers(rows)
        axes.barh(range(len(rows)), [100 * row.sparsity for row in rows], color=BLUE, height=0.7)
        for index, row in enumerate(rows):
            axes.annotate(percent(row.sparsity, 1).removesuffix(" %"), (101, index), (0, 0), **_BESIDE)
        axes.axvline(100 * budget.sparsity, color=ORANGE, linestyle="--", linewidth=1.4)
        axes.set(xlabel=f"sparsity (%); dashed: the network, {percent(budget.sparsity)}", xlim=(0, 106))
        return svg(figure)


def threshold_picture(epochs: Sequence[Record], budget: Budget) -> str | None:
    """Draw each layer's threshold after each epoch. Return None if no layer has one."""
    names = [row.name for row in budget.rows if row.threshold is not None]
    if not names:
        return None
    numbers = [record["epoch"] for record in epochs]
    lines = {name: [record["layers"][name]["threshold"] for record in epochs] for name in names}
    if all(np.allclose(line, lines[names[0]], rtol=1e-3) for line in lines.values()):
        lines = {"all layers": lines[names[0]]}
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        colours = matplotlib.colormaps["viridis"]
        marker = "o" if len(epochs) < 3 else None
        for index, (name, values) in enumerate(lines.items()):
            colour = colours(0.2 + 0.65 * index / max(1, len(lines) - 1))
            axes.plot(numbers, values, color=colour, label=name, marker=marker, markersize=4)
        if len(lines) <= LEGEND_LAYERS:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            axes.set_title("dark: first layers, bright: last layers")
        axes.set(xlabel="epoch", ylabel="threshold", ylim=(0, None))
        return svg(figure)


def flops_picture(budget: Budget) -> str:
    """Draw the multiply-adds of each layer, dense and sparse."""
    rows = [row for row in budget.rows if row.dense_flops]
    with matplotlib.rc_context(STYLE):
        figure, axes = _layers(rows)
        axes.barh(
            range(len(rows)), [row.dense_flops for row in rows], color=GREY, height=0.7, alpha=0.55, label="dense"
        )
        axes.barh(range(len(rows)), [row.flops for row in rows], color=BLUE, height=0.7, label="sparse")
        for index, row in enumerate(rows):
            text = percent(row.flops / row.dense_flops, 1)
            axes.annotate(text, (row.dense_flops, index), (3, 0), **_BESIDE)
        axes.set(xlabel="multiply-adds for one input", xlim=(0, 1.12 * max(row.dense_flops for row in rows)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return svg(figure)


def size_picture(budget: Budget) -> str:
    """Draw the bytes of the weights: dense in float32, and sparse, with nonzeros in float32 and a bitmap."""
    dense, values, bitmap = 4 * budget.params, 4 * budget.nonzeros, budget.params / 8
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 1.7), layout="constrained")
        axes = figure.subplots()
        axes.barh(["sparse", "dense"], [values, dense], color=[BLUE, GREY], height=0.6)
        axes.barh(["sparse"], [bitmap], left=[values], color=ORANGE, height=0.6)
        for index, size in enumerate((values + bitmap, dense)):
            axes.annotate(size_text(size), (size, index), (4, 0), **_BESIDE)
        axes.set(
            xlim=(0, 1.12 * dense), xlabel="bytes of the weights; blue: nonzeros (float32), orange: one bit per weight"
        )
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.grid(axis="y", visible=False)
        return svg(figure)


def size_text(size: float) -> str:
    """Return a number of bytes with its unit: 305 kB, 12.4 MB."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5:
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}"


_BESIDE = {"textcoords": "offset points", "va": "center", "ha": "left", "fontsize": 8.5}


def _layers(rows: Sequence[LayerBudget]) -> tuple[Figure, Axes]:
    """Return a figure and axes with one line per layer, the first on top."""
    figure = Figure((9.0, 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(rows)), [row.name or "(model)" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    return figure, axes


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element without a background that scales with the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(TEXT, "currentColor")
    return re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" width="[\d.]+pt"', 'width="100%"', svg, count=1
    )
