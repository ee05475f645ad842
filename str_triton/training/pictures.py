"""The report's pictures, as SVG with the page's font and text colour, light or dark.

Every picture is `WIDTH` points wide, so that the smallest text has 11 pixels or more on a phone of 390 pixels. On wide
screens the page puts pictures side by side.
"""

import colorsys
import html
import io
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from str_triton.budget.budget import Budget, LayerBudget
from str_triton.files import percent
from str_triton.training.metrics import Record

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # of matplotlib 3.11

WIDTH, FONT_SIZE = 360, 11.5
BLUE, ORANGE, GREY = "#3f87cf", "#d2691e", "#7f8893"  # each contrasts 3:1 or more with the light and the dark page
LUMINANCE = 0.2  # of the colours of layers, which contrast with both pages
TEXT = "#010203"  # a placeholder for the page's text colour, used nowhere else in a picture
LEGEND_LAYERS, NAME_LENGTH = 14, 22
STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": FONT_SIZE,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": FONT_SIZE,
    "axes.titlelocation": "left",
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": FONT_SIZE,
}


def progress_pictures(epochs: Sequence[Record]) -> list[str]:
    """Draw accuracy, and sparsity, after each epoch."""
    numbers = [record["epoch"] for record in epochs]
    with matplotlib.rc_context(STYLE):
        figure, axes = epoch_axes("Accuracy (%)")
        for key, colour, label in (("train_accuracy", GREY, "training"), ("accuracy", BLUE, "test")):
            values = [100 * record[key] for record in epochs]
            axes.plot(numbers, values, color=colour, label=label, **markers(epochs))
        axes.legend(loc="lower right")
        pictures = [svg(figure, "Accuracy after each epoch")]
        figure, axes = epoch_axes("Sparsity (% of the weights that are zero)")
        values = [100 * record["sparsity"] for record in epochs]
        axes.plot(numbers, values, color=ORANGE, **markers(epochs))
        axes.set_ylim(-2, 102)
        return [*pictures, svg(figure, "Sparsity after each epoch")]


def sparsity_picture(budget: Budget) -> str:
    """Draw the sparsity of each covered layer, and the network's sparsity as a line."""
    rows = budget.covered_rows
    with matplotlib.rc_context(STYLE):
        figure, axes = _layers(rows)
        axes.barh(range(len(rows)), [100 * row.sparsity for row in rows], color=BLUE, height=0.7)
        for index, row in enumerate(rows):
            _write_beside(axes, percent(row.sparsity, 1).removesuffix(" %"), (101, index), 2)
        axes.axvline(100 * budget.sparsity, color=ORANGE, linestyle="--", linewidth=1.4)
        axes.set(xlabel="sparsity (%)", xlim=(0, 130), xticks=range(0, 101, 25))
        return svg(figure, "Sparsity of each layer")


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
        figure, axes = epoch_axes("Threshold", legend_lines=len(lines))
        for name, values, colour in zip(short(list(lines)), lines.values(), layer_colours(len(lines)), strict=True):
            axes.plot(numbers, values, color=colour, label=name, **markers(epochs))
        name_lines(figure, axes)
        axes.set_ylim(0, None)
        return svg(figure, "Threshold of each layer after each epoch")


def flops_picture(budget: Budget) -> str:
    """Draw the multiply-adds of each layer, dense and sparse."""
    rows = [row for row in budget.rows if row.dense_flops]
    with matplotlib.rc_context(STYLE):
        figure, axes = _layers(rows)
        axes.barh(range(len(rows)), [row.dense_flops for row in rows], color=GREY, height=0.7, alpha=0.55)
        axes.barh(range(len(rows)), [row.flops for row in rows], color=BLUE, height=0.7)
        for index, row in enumerate(rows):
            text = percent(row.flops / row.dense_flops, 1)
            _write_beside(axes, text, (row.dense_flops, index), 3)
        axes.set(xlabel="multiply-adds for one input", xlim=(0, 1.4 * max(row.dense_flops for row in rows)))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return svg(figure, "Multiply-adds of each layer")


def size_picture(budget: Budget) -> str:
    """Draw the bytes of the weights: dense in float32, and sparse, with nonzeros in float32 and a bitmap."""
    dense, values, bitmap = 4 * budget.params, 4 * budget.nonzeros, budget.params / 8
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH / 72, 1.5), layout="constrained")
        axes = figure.subplots()
        axes.barh(["sparse", "dense"], [values, dense], color=[BLUE, GREY], height=0.6)
        axes.barh(["sparse"], [bitmap], left=[values], color=ORANGE, height=0.6)
        for index, size in enumerate((values + bitmap, dense)):
            _write_beside(axes, size_text(size), (size, index), 4)
        axes.set(xlim=(0, 1.3 * dense), xlabel="bytes of the weights")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.grid(axis="y", visible=False)
        return svg(figure, "Bytes of the weights")


def size_text(size: float) -> str:
    """Return a number of bytes with its unit: 305 kB, 12.4 MB."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5:
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}"


def _write_beside(axes: Axes, text: str, place: tuple[float, float], shift: int) -> None:
    """Write a text to the right of a place, by some points."""
    axes.annotate(text, place, (shift, 0), textcoords="offset points", va="center", ha="left")


def _layers(rows: Sequence[LayerBudget]) -> tuple[Figure, Axes]:
    """Return a figure and axes with one line per layer, the first on top."""
    figure = Figure((WIDTH / 72, 0.8 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(rows)), [name or "(model)" for name in short([row.name for row in rows])])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    return figure, axes


def epoch_axes(title: str, *, legend_lines: int = 0) -> tuple[Figure, Axes]:
    """Return a figure and axes over epochs, with room for a legend of so many lines below."""
    lines = legend_lines if legend_lines <= LEGEND_LAYERS else 2
    figure = Figure((WIDTH / 72, 2.8 + 0.11 * lines), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(title=title, xlabel="epoch")
    return figure, axes


def name_lines(figure: Figure, axes: Axes) -> None:
    """Put the names of the axes' lines below the picture, or explain the colours if there are too many names."""
    lines = len(axes.get_lines())
    if lines <= LEGEND_LAYERS:
        figure.legend(loc="outside lower center", ncols=min(2, lines))
    else:
        figure.supxlabel("blue: first layers, orange: last layers", fontsize=FONT_SIZE)


def markers(points: Sequence[object]) -> dict[str, Any]:
    """Return the markers of a line with so many points: one or two points would be hard to see without markers."""
    return {"marker": "o" if len(points) < 3 else None, "markersize": 4}


def short(names: Sequence[str]) -> list[str]:
    """Return the names of layers, shortened if one is too long for a picture.

    The parts that all names begin with are left out, then the middle of a name that is still too long.
    """
    if max(map(len, names), default=0) <= NAME_LENGTH:
        return list(names)
    parts = [name.split(".") for name in names]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
    shared = min(shared, *(len(own) - 1 for own in parts))
    rest = [".".join(own[shared:]) for own in parts]
    half = NAME_LENGTH // 2
    return [name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}" for name in rest]


def layer_colours(number: int) -> list[tuple[float, float, float]]:
    """Return colours from blue over purple to orange, all of the luminance `LUMINANCE`."""
    hues = np.linspace(0.58, 1.07, number) if number > 1 else [0.58]
    return [_with_luminance(hue % 1.0) for hue in hues]


def _with_luminance(hue: float) -> tuple[float, float, float]:
    lightest, darkest = 1.0, 0.0
    for _ in range(20):  # bisect the lightness
        lightness = (lightest + darkest) / 2
        colour = colorsys.hls_to_rgb(hue, lightness, 0.6)
        lightest, darkest = (lightness, darkest) if luminance(colour) > LUMINANCE else (lightest, lightness)
    return colour


def luminance(colour: Sequence[float]) -> float:
    """Return the relative luminance of an sRGB colour with parts in 0..1, as in WCAG 2."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def svg(figure: Figure, label: str) -> str:
    """Return the figure as an <svg> element without a background that scales with the page. ``label`` describes it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(TEXT, "currentColor")
    size = r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" width="[\d.]+pt"'
    return re.sub(size, f'width="100%" role="img" aria-label="{html.escape(label)}"', svg, count=1)
