"""--budget: the sparsity of each layer, from a finished run, a file of percentages, or the paper's tables."""

import csv
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from str_triton import Budget
from str_triton.cnn import published


def layer_sparsities(path: str, layers: Iterable[str]) -> dict[str, float]:
    """Return the sparsity, 0 to 1, of each of the model's layers from a file, in the model's order.

    Args:
        path: the folder of a finished run; its budget.json or budget.csv; a JSON object {layer: sparsity in %}; a CSV
            file of two columns, layer and sparsity in %, with or without a heading; or the name of a published point.
        layers: the names of the model's layers.

    Raises:
        ValueError: a damaged file, a value outside 0 to 100 %, a layer that is missing, unknown or named twice.
        OSError: the file cannot be read.
    """
    found, layers = named_sparsities(path), list(layers)
    for name in layers:
        if name not in found:
            raise ValueError(f"--budget {path}: the model's layer {name!r} is missing; the file must name every layer")
    for name in found:
        if name not in layers:
            raise ValueError(f"--budget {path}: the model has no layer {name!r}; its first layer is {layers[0]!r}")
    return {name: found[name] for name in layers}


def named_sparsities(path: str) -> dict[str, float]:
    """Return all sparsities in a file, by layer, whatever the layers are called. See `layer_sparsities`."""
    point = next((point for point in published.POINTS if point.name == path), None)
    if point is None:
        return read_sparsities(Path(path))
    return {name: sparsity / 100 for name, sparsity in published.layer_sparsities(point.model, point.sparsity).items()}


def read_sparsities(path: Path) -> dict[str, float]:
    """Return all sparsities in a run folder or a file, by layer. See `layer_sparsities` for the kinds of files."""
    if path.is_dir():
        if not (path / "summary.json").is_file():
            raise ValueError(f"--budget {path}: not the folder of a finished run (no summary.json)")
        path = path / "budget.json"
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"--budget {path}: not a text file: {error}") from None
    return _from_json(path, text) if text.lstrip().startswith(("{", "[")) else _from_csv(path, text)


def _from_json(path: Path, text: str) -> dict[str, float]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would keep one of two equal names
    except json.JSONDecodeError as error:
        raise ValueError(f"--budget {path}: not a budget in JSON: {error}") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError(f"--budget {path}: expected an object of layers and their sparsities in %")
    if isinstance(dict(pairs).get("rows"), list):
        return _from_budget(path, Budget.from_json(path))
    return _from_percent(path, pairs)


def _from_csv(path: Path, text: str) -> dict[str, float]:
    try:
        lines = [line for line in csv.reader(text.splitlines(), strict=True) if line]
    except csv.Error as error:
        raise ValueError(f"--budget {path}: not a budget in CSV: {error}") from None
    if lines and len(lines[0]) > 2:
        return _from_budget(path, Budget.from_csv(path))
    wrong = next((line for line in lines if len(line) != 2), None)
    if not lines or wrong:
        given = textwrap.shorten(f"{wrong or 'nothing'}", 80)
        raise ValueError(f"--budget {path}: expected two columns, layer and sparsity in %, got {given}")
    if not _is_number(lines[0][1]):
        del lines[0]  # the heading
    return _from_percent(path, ((name, value) for name, value in lines))


def _from_budget(path: Path, budget: Budget) -> dict[str, float]:
    return _collect(path, ((row.name, row.sparsity) for row in budget.covered_rows))


def _from_percent(path: Path, percents: Iterable[tuple[str, Any]]) -> dict[str, float]:
    found = _collect(path, ((name, _share(path, name, value)) for name, value in percents))
    largest = max(found.values(), default=0.0)
    if 0 < largest <= 0.01:
        raise ValueError(
            f"--budget {path}: no layer has a sparsity of more than {100 * largest:g} %; the numbers are percent: "
            "write 90, not 0.9"
        )
    return found


def _collect(path: Path, shares: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, share in shares:
        if name in found:
            raise ValueError(f"--budget {path}: layer {name!r} is named twice")
        found[name] = share
    return found


def _share(path: Path, name: str, percent: Any) -> float:
    if isinstance(percent, bool) or not _is_number(percent):
        raise ValueError(f"--budget {path}, layer {name!r}: expected a sparsity in %, got {percent!r}")
    if not 0 <= float(percent) <= 100:
        raise ValueError(f"--budget {path}, layer {name!r}: a sparsity of {percent} % is outside 0 to 100")
    return float(percent) / 100


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
