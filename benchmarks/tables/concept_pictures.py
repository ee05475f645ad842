"""The pictures of docs/concepts.md, as SVG: python -m benchmarks.tables.concept_pictures [--check].

The numbers in them are examples, not measurements. Each picture has its own background, which follows the reader's
light or dark setting, and is 360 units wide, so that its text keeps its size on a phone.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs"
WIDTH = 360
STYLE = """<style>
.plate{fill:#fff}.ink{stroke:#333}.grid{stroke:#ccc}text{fill:#333;font:12px sans-serif}
.a{stroke:#1f6fb4;fill:none}.b{stroke:#c2410c;fill:none}.fa{fill:#1f6fb4}.fb{fill:#c2410c}.fg{fill:#bbb}
@media (prefers-color-scheme:dark){.plate{fill:#1c1e26}.ink{stroke:#ddd}.grid{stroke:#444}text{fill:#ddd}
.a{stroke:#6fb3f2}.b{stroke:#fb923c}.fa{fill:#6fb3f2}.fb{fill:#fb923c}.fg{fill:#555}}
</style>"""
MAGNITUDES = (0.03, 0.05, 0.08, 0.1, 0.13, 0.17, 0.2, 0.26, 0.31, 0.4, 0.52, 0.7)  # of a layer's weights, sorted


def line(kind: str, points: Iterable[tuple[float, float]], dashed: bool = False) -> str:
    """Return a polyline of the class `kind`."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline class="{kind}" stroke-width="2" fill="none"{dash} points="{path}"/>'


def bar(kind: str, x: float, base: float, width: float, height: float) -> str:
    """Return a bar that stands on `base`."""
    return f'<rect class="{kind}" x="{x:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Return words at a point."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def svg(title: str, height: int, parts: Iterable[str]) -> str:
    """Return a whole file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="480" role="img">'
    name = f"<title>{title}</title>"
    plate = f'<rect class="plate" width="{WIDTH}" height="{height}" rx="8"/>'
    return "\n".join([head, name, STYLE, plate, *parts, "</svg>", ""])


def soft_threshold() -> str:
    """Draw the soft threshold and the hard one over the weight."""
    unit, x0, y0, alpha = 70, 180, 120, 0.8

    def at(w: float, s: float) -> tuple[float, float]:
        return x0 + unit * w, y0 - unit * s * 0.6

    soft = [at(-2.2, -2.2 + alpha), at(-alpha, 0), at(alpha, 0), at(2.2, 2.2 - alpha)]
    parts = [
        line("grid", [at(-2.4, 0), at(2.4, 0)]),
        line("grid", [(x0, 20), (x0, 220)]),
        line("b", [at(-2.2, -2.2), at(-alpha, -alpha)], dashed=True),
        line("b", [at(alpha, alpha), at(2.2, 2.2)], dashed=True),
        line("a", soft),
        text(*at(alpha, -0.3), "threshold", "middle"),
        text(*at(-alpha, 0.18), "−threshold", "middle"),
        text(352, y0 - 6, "weight", "end"),
        text(12, 30, "weight in use"),
        line("a", [(12, 240), (36, 240)]),
        text(42, 244, "soft threshold"),
        line("b", [(180, 240), (204, 240)], dashed=True),
        text(210, 244, "magnitude pruning"),
    ]
    return svg("The soft threshold of a weight", 256, parts)


def offset() -> str:
    """Draw the magnitudes of two layers' weights, and one threshold for both."""
    threshold, survivors, parts = 0.3, 0, []
    for number, (name, factor) in enumerate((("layer 1", 1.0), ("layer 2", 0.6))):
        base = 112 + 112 * number
        for index, magnitude in enumerate(MAGNITUDES):
            kind = "fa" if magnitude * factor > threshold else "fg"
            parts.append(bar(kind, 20 + 26 * index, base, 18, 110 * magnitude * factor))
        kept = sum(magnitude * factor > threshold for magnitude in MAGNITUDES)
        survivors += kept
        parts += [
            line("ink", [(14, base), (346, base)]),
            line("b", [(14, base - 110 * threshold), (346, base - 110 * threshold)], dashed=True),
            text(20, base - 66, f"{name}: {kept} of {len(MAGNITUDES)} weights survive"),
        ]
    weights = 2 * len(MAGNITUDES)
    zeros = 100 * (weights - survivors) / weights
    parts.append(text(20, 252, f"one threshold: {survivors} of {weights} survive, {zeros:.0f} % zeros"))
    return svg("One threshold meets a target over two layers", 264, parts)


def rank() -> str:
    """Draw a matrix's singular values at three times of training, and the threshold."""
    parts = []
    spectra = (
        ("start: rank 8", 0.0, (1.0, 0.9, 0.8, 0.72, 0.63, 0.55, 0.48, 0.4)),
        ("midway: rank 5", 0.3, (1.1, 0.9, 0.66, 0.46, 0.38, 0.26, 0.2, 0.12)),
        ("end: rank 3", 0.4, (1.2, 0.95, 0.6, 0.33, 0.22, 0.12, 0.06, 0.02)),
    )
    for number, (name, threshold, values) in enumerate(spectra):
        left, base = 14 + 116 * number, 150
        parts += [
            bar("fa" if value > threshold else "fg", left + 13 * index, base, 9, 95 * value)
            for index, value in enumerate(values)
        ]
        cut = base - 95 * threshold
        parts += [
            line("ink", [(left - 4, base), (left + 104, base)]),
            line("b", [(left - 4, cut), (left + 104, cut)], dashed=True),
            text(left, 170, name),
        ]
    parts.append(text(14, 194, "below the threshold a component is removed"))
    return svg("The rank of a matrix while it trains", 206, parts)


PICTURES: dict[str, Callable[[], str]] = {
    "concept-soft-threshold.svg": soft_threshold,
    "concept-offset.svg": offset,
    "concept-rank.svg": rank,
}


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures. With --check only print which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a picture is out of date")
    check = parser.parse_args(arguments).check
    outdated = [
        name for name, draw in PICTURES.items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != draw()
    ]
    for name in outdated:
        if check:
            print(f"{name} is out of date: run python -m benchmarks.tables.concept_pictures", file=sys.stderr)
        else:
            (FOLDER / name).write_text(PICTURES[name]())
    return int(check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
