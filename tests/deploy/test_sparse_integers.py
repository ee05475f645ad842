"""The kernels on bytes: the integers of the plain reference, on every path of the source."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.studies.int8_fuzz import Case, check, compiled
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Convolution, Graph, Input
from str_triton.deploy.sparse.graph.quantized import Dequantize, Grid, Quantize, QuantizedConvolution, QuantizedMean
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.runtime.images import PAD
from str_triton.deploy.sparse.runtime.operations import nonzeros
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.quads import quads
from str_triton.deploy.sparse.runtime.trial import try_out


def test_random_networks_are_equal(kernels):
    assert {seed: wrong for seed in range(30) if (wrong := check(seed, kernels))} == {}


@pytest.mark.parametrize("path", ["vnni-emulated", "portable"])
def test_other_paths_are_equal(kernels, tmp_path: Path, path: str):
    library = compiled(path, tmp_path, "-O1")
    assert {seed: wrong for seed in range(12) if (wrong := check(seed, library))} == {}


@pytest.mark.parametrize(
    "node",
    [
        Quantize("y", ["q"], Grid(0.5, 3)),  # The kernel would read four bytes for each code.
        Dequantize("y", ["c"], Grid(0.5, 3)),
        QuantizedMean("y", ["c"], grid=Grid(0.5, 3)),
    ],
    ids=["codes of codes", "floats of floats", "a mean of floats"],
)
def test_nodes_of_a_file_that_read_the_other_kind(kernels, node):
    weight = torch.randn(3, 3, 1, 1)
    layer = Convolution("c", ["x"], weight, torch.zeros(3))
    graph = Graph([Input("x", []), layer, Quantize("q", ["x"], Grid(0.1, 9)), node], [Ref("y")])
    x = torch.randn(2, 3, 9, 9)
    plan = Plan(graph, try_out(graph, [x]), {"c": Choice("sparse")}, kernels)
    (wanted,), _ = graph.run([x])
    torch.testing.assert_close(plan.run([x])["y"], wanted, rtol=1e-5, atol=1e-5)


def test_the_seeds_have_every_kind():
    cases = [Case(seed) for seed in range(30)]
    layers = [node for case in cases for node in case.graph.layers() if isinstance(node, QuantizedConvolution)]
    assert any(layer.is_depthwise for layer in layers)
    assert any(len(layer.inputs) > 1 for layer in layers)
    assert any(layer.stride != (1, 1) and layer.padding != (0, 0) and layer.grids[0].zero for layer in layers)
    assert {type(node).__name__ for case in cases for node in case.nodes} >= {
        "MaxPool",
        "Call",
        "QuantizedMean",
        "QuantizedGate",
    }
    assert any(layer.table is not None for layer in layers)
    assert any(PAD in {getattr(node, "target", None) for node in case.nodes} for case in cases)


@pytest.mark.parametrize("signs", [(-1, 1), (1, 1), (-1, -1)])
def test_quads_hold_every_weight_once_and_no_pair_saturates(signs: tuple[int, int]):
    """Two products with bytes fit into 16 bits, whatever the bytes are, and no weight is lost."""
    draw = np.random.default_rng(0)
    weight = (draw.integers(0, 128, (7, 3, 3, 2)) * draw.choice(signs, (7, 3, 3, 2))).astype(np.int8)
    weight[draw.random(weight.shape) < 0.3] = 0
    weight[1], weight[2, 0, 0, 0], weight[2].flat[1:] = 0, 127, 0
    first, places, weights = quads(weight, 1)
    pairs = weights.reshape(-1, 2).astype(int)
    assert max(255 * np.maximum(pairs, 0).sum(1)) < 2**15
    assert min(255 * np.minimum(pairs, 0).sum(1)) >= -(2**15)
    starts, sources, values = nonzeros(weight, 1)
    for channel, (begin, end) in enumerate(itertools.pairwise(first)):
        found = sorted((p, w) for p, w in zip(places[begin:end].flat, weights[begin:end].flat, strict=True) if w)
        wanted = slice(starts[channel], starts[channel + 1])
        assert found == sorted(zip(sources[wanted], values[wanted], strict=True))
        assert set(places[begin:end].flat) <= set(sources[wanted])
