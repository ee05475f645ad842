"""Charts of the studies as SVG: equal lines give equal bytes; readable on a phone and in the dark."""

import io
from pathlib import Path
from typing import Any

DARK = "@media (prefers-color-scheme: dark){svg{filter: invert(1) hue-rotate(180deg)}}"


def new(salt: str, parts: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, one below the other. ``salt`` takes the place of the random part of SVG's names."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = salt
    figure, axes = plt.subplots(parts, 1, figsize=(5, 3.8 * parts), constrained_layout=True, squeeze=False)
    return figure, list(axes[:, 0])


def save(figure: Any, path: Path) -> None:
    """Write a figure without a date, and with inverted colours where the reader's screen is dark."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    path.write_text(text.getvalue().replace("</style>", f"{DARK}</style>", 1))
