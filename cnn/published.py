"""The published figures of the paper's convolutional networks on ImageNet-1K.

Source: Kusupati et al., ICML 2020 (arXiv 2002.03231), tables of results and appendix; sparsities by layer: Tables 6, 8.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = "Kusupati et al., ICML 2020"
DENSE_WEIGHT_DECAY = 2.0**-15


@dataclass(frozen=True)
class Dense:
    """A dense network: its title, top-1 accuracy in %, number of weights, and multiply-adds at 224 x 224."""

    title: str
    top1: float
    params: int
    flops: int


@dataclass(frozen=True)
class Point:
    """A published sparse network, with SGD's weight decay (lambda) and the initial raw threshold (s_init) for it.

    Attributes:
        model: the network's name in `str_triton.cnn.models`.
        sparsity, top1: share of zero weights, and accuracy, in %.
        params, flops: nonzero weights and multiply-adds, in millions, as printed.
    """

    model: str
    sparsity: float
    top1: float
    params: float
    flops: int
    weight_decay: float
    raw_threshold_init: float

    @property
    def name(self) -> str:
        """The name of the recipe."""
        return f"{self.model}-str-{self.sparsity:.2f}"


DENSE = {
    "resnet50": Dense("ResNet50", 77.01, 25_502_912, 4_089_284_608),
    "mobilenetv1": Dense("MobileNetV1", 71.95, 4_209_088, 568_740_352),
}

POINTS = (
    Point("resnet50", 79.55, 76.19, 5.22, 766, 1.7e-5, -3200.0),
    Point(
        "resnet50", 81.27, 76.12, 4.78, 705, 1.751757813e-5, -3200.0
    ),  # the paper prints 4.47; its Table 6 gives this
    Point("resnet50", 87.70, 74.73, 3.14, 402, 2.051757813e-5, -3200.0),
    Point("resnet50", 90.23, 74.31, 2.49, 343, 2.251757813e-5, -3200.0),
    Point("resnet50", 90.55, 74.01, 2.41, 341, 2.051757813e-5, -800.0),
    Point("resnet50", 94.80, 70.97, 1.33, 182, 3.051757813e-5, -3200.0),
    Point("resnet50", 95.03, 70.40, 1.27, 159, 3.351757813e-5, -12800.0),
    Point("resnet50", 95.15, 70.23, 1.24, 162, 3.051757813e-5, -1600.0),
    Point("resnet50", 96.11, 67.78, 0.99, 127, 3.051757813e-5, -100.0),
    Point("resnet50", 96.53, 67.22, 0.88, 117, 4.051757813e-5, -12800.0),
    Point("resnet50", 97.78, 62.84, 0.57, 80, 5.217578125e-5, -12800.0),
    Point("resnet50", 98.05, 61.46, 0.50, 73, 5.651757813e-5, -12800.0),
    Point("resnet50", 98.22, 59.76, 0.45, 68, 6.051757813e-5, -12800.0),
    Point("resnet50", 98.79, 54.79, 0.31, 54, 7.551757813e-5, -12800.0),
    Point("resnet50", 98.98, 51.82, 0.26, 47, 8.551757813e-5, -12800.0),
    Point("resnet50", 99.10, 50.35, 0.23, 44, 9.051757813e-5, -12800.0),
    Point("mobilenetv1", 75.28, 68.35, 1.04, 101, 1.551757813e-5, -100.0),
    Point("mobilenetv1", 79.07, 66.52, 0.88, 81, 1.551757813e-5, -25.0),
    Point("mobilenetv1", 85.80, 64.83, 0.60, 55, 3.051757813e-5, -3200.0),
    Point("mobilenetv1", 89.01, 62.10, 0.46, 42, 3.751757813e-5, -12800.0),
    Point("mobilenetv1", 89.62, 61.51, 0.44, 40, 3.751757813e-5, -3200.0),
)

KINDS = ("", "-finetune")  # the recipes for an exact sparsity: from scratch, from a trained network

# Top-1 accuracy of other methods on ResNet50 in the paper's table, by sparsity in %.
BASELINES = {
    80: {"GMP": 75.60, "DNW": 76.00},
    90: {"GMP": 73.91, "DNW": 74.00},
    95: {"GMP": 70.59, "DNW": 68.30},
    98: {"GMP": 57.90, "DNW": 58.20},
    99: {"GMP": 44.78},
}


def _point_text(point: Point) -> str:
    dense = DENSE[point.model]
    return f"""published ({SOURCE}), {dense.title} on ImageNet-1K, FLOPs at 224x224:
        sparsity  top-1       weights  FLOPs
dense    0.00 %  {dense.top1:.2f} %  {dense.params:>10,}  {dense.flops:,}
STR     {point.sparsity:5.2f} %  {point.top1:.2f} %  {point.params:>9.2f}M  {point.flops}M"""


def _dense_text(dense: Dense) -> str:
    figures = f"{dense.top1:.2f} % top-1, {dense.params:,} weights, {dense.flops:,} FLOPs"
    return f"published ({SOURCE}), dense {dense.title} on ImageNet-1K, FLOPs at 224x224: {figures}"


def _exact_text(percent: int) -> str:
    dense = DENSE["resnet50"]
    point = min((p for p in POINTS if p.model == "resnet50"), key=lambda point: abs(point.sparsity - percent))
    others = ", ".join(f"{method} {top1:.2f} %" for method, top1 in BASELINES[percent].items())
    left = dense.params - round(dense.params * percent / 100)
    return f"{_point_text(point)}\nother methods' top-1 at {percent} %: {others}; {percent} % leave {left:,} weights"


# The published figures by recipe, as text.
PUBLISHED = {
    **{point.name: _point_text(point) for point in POINTS},
    **{f"{model}-dense": _dense_text(dense) for model, dense in DENSE.items()},
    **{f"resnet50-str-exact-{percent}{kind}": _exact_text(percent) for percent in BASELINES for kind in KINDS},
}


def layer_sparsities(model: str, sparsity: float) -> dict[str, float]:
    """Return the published sparsity of each layer, in %, in the network's order.

    Args:
        model: the network's name in `str_triton.cnn.models`.
        sparsity: the whole network's sparsity in %: any published one of ResNet50, or 89.01 of MobileNetV1.

    Raises:
        ValueError: a network or a sparsity for which no layers were published.
    """
    table = _tables().get(model, {"layers": [], "points": {}})
    key = f"{sparsity:.2f}"
    if key not in table["points"]:
        names = [f"{name} {point}" for name in DENSE for point in _tables()[name]["points"]]
        raise ValueError(f"no layers were published for {model} at {key} %; they were for {', '.join(names)}")
    return dict(zip(table["layers"], table["points"][key], strict=True))


@cache
def _tables() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "assets" / "published_sparsities.json").read_text(encoding="utf-8"))
