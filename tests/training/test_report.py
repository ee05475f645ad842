import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from str_triton.budget.budget import Budget, LayerBudget
from str_triton.training.metrics import Metrics
from str_triton.training.page import STYLE
from str_triton.training.pictures import (
    BLUE,
    GREY,
    NAME_LENGTH,
    ORANGE,
    TEXT,
    layer_colours,
    luminance,
    short,
    size_text,
)
from str_triton.training.report import report

BUDGET = Budget(
    [
        LayerBudget("stem", 288, 100, 18_432, 6_400, 0.011),
        LayerBudget("<head>", 640, 10, 640, 10, 0.07),
        LayerBudget("(average pools)", 0, 0, 1_024, 1_024),
    ]
)


def run_folder(folder: Path, *, epochs: int, thresholds: bool) -> Path:
    summary = {"accuracy": 0.9861, "sparsity": 0.88, "epochs": epochs, "seconds": 12.5, "recipe": "digits"}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"data": "digits", "seed": 0, "data_dir": None}))
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}, "command": ["train", "<x>"]}))
    rows = BUDGET.rows if thresholds else [LayerBudget("stem", 288, 288, 18_432, 18_432)]
    Budget(rows).to_json(folder / "budget.json")
    metrics = Metrics(folder)
    for epoch in range(1, epochs + 1):
        layers = {row.name: {"sparsity": row.sparsity, "threshold": row.threshold} for row in rows}
        metrics.append({"kind": "step", "step": 10 * epoch, "loss": 1.0})
        metrics.append(
            {"kind": "epoch", "step": 10 * epoch, "epoch": epoch, "train_accuracy": 0.9, "accuracy": 0.8,
             "sparsity": 0.1 * epoch, "layers": layers}
        )  # fmt: skip
    metrics.close()
    return folder


class Tags(HTMLParser):
    """A parser that checks the nesting of tags and records the external addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(("epochs", "thresholds"), [(1, True), (5, True), (3, False)])
def test_the_page_is_whole_and_self_contained(tmp_path: Path, epochs: int, thresholds: bool):
    page = report(run_folder(tmp_path, epochs=epochs, thresholds=thresholds))
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(source.startswith("#") for source in tags.sources)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == (6 if thresholds else 5)
    for picture in pictures:
        ElementTree.fromstring(picture)
        require_readable(picture)
    assert TEXT not in page
    assert "currentColor" in pictures[0]


PHONE = 390 - 2 * 16  # pixels of a picture on a phone: the page's margins are 1 rem


def require_readable(picture: str) -> None:
    """Check that no text of a picture is smaller than 11 pixels on a phone."""
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', picture)[1])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", picture)]
    assert sizes
    assert min(sizes) * PHONE / width >= 11


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("page", re.findall(r"--page: (#\w+)", STYLE))
@pytest.mark.parametrize("colour", [BLUE, ORANGE, GREY, *layer_colours(1), *layer_colours(12)])
def test_colours_are_seen_on_the_light_and_on_the_dark_page(page: str, colour: str | tuple[float, float, float]):
    assert contrast(to_rgb(colour), to_rgb(page)) >= 3


def test_neighbouring_layers_have_different_colours():
    colours = layer_colours(8)
    steps = [sum(abs(a - b) for a, b in zip(one, two, strict=True)) for one, two in itertools.pairwise(colours)]
    assert min(steps) > 0.05


def test_contrast_is_that_of_wcag():
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert luminance(to_rgb("#808080")) == pytest.approx(0.2159, abs=1e-4)


def test_long_names_are_shortened_and_stay_different():
    assert short(["blocks.1.conv2", "blocks.2.conv1"]) == ["blocks.1.conv2", "blocks.2.conv1"]
    assert short(["rnn.weight_ih_l0", "rnn.weight_hh_l0_reverse"]) == ["weight_ih_l0", "weight_hh_l0_reverse"]
    blocks = [f"features.{number}.block.1.conv_pointwise" for number in range(12)]
    assert short(blocks)[11] == "11.block.1…v_pointwise"
    assert len(set(short(blocks))) == 12
    assert [len(name) for name in short(["x" * 80])] == [NAME_LENGTH]
    assert short(["a.b", "a.b." + "c" * 20]) == ["b", "b." + "c" * 20]


def test_the_page_shows_the_figures(tmp_path: Path):
    page = report(run_folder(tmp_path, epochs=2, thresholds=True))
    for text in ("98.61 %", "88.15 %", "&lt;head&gt;", "18,432", "0.011", "torch 2.13.0", "train &lt;x&gt;"):
        assert text in page
    assert "<head>" not in page.replace("<head>", "", 1)
    assert "main { padding: 1.5rem 1rem" in page  # on a phone: see PHONE
    assert len(re.findall(r'<p class="hint">[^<]+</p><div class="wide" tabindex="0"><table>', page)) == 1
    assert page.count('<table class="plain">') == 2  # these wrap


def test_the_page_marks_what_is_not_covered_and_rounds_no_sparsity_to_all(tmp_path: Path):
    folder = run_folder(tmp_path, epochs=2, thresholds=False)
    rows = [LayerBudget("stem", 589_824, 29, 4, 1, 0.1), LayerBudget("experts", 10, 9, 4, 3, covered=False)]
    Budget(rows).to_json(folder / "budget.json")
    (record,) = ({"layers": {row.name: {"sparsity": row.sparsity, "threshold": row.threshold} for row in rows}},)
    text = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.dumps(json.loads(line) | (record if "layers" in line else {})) for line in text]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report(folder)
    for text in ("accuracy at 99.995 % sparsity", "experts (not covered)", "not covered: 1 matrix, 0.002 %"):
        assert text in page
    assert ">100.00 %" not in page


def test_ids_of_different_pictures_do_not_collide(tmp_path: Path):
    ids = re.findall(r'<clipPath id="([^"]+)"', report(run_folder(tmp_path, epochs=3, thresholds=True)))
    assert len(ids) == len(set(ids)) > 3


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (306_816, "307 kB"), (102e6, "102 MB"), (999.7, "1 kB"), (5.2e12, "5.2 TB")]
)
def test_sizes(size: float, text: str):
    assert size_text(size) == text
