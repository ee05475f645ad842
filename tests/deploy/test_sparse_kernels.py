"""The kernels in C against torch in float64: every geometry of a convolution, every way to cut the work."""

import ctypes
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import ACTIVATIONS, Convolution, Graph, Input, Linear
from str_triton.deploy.sparse.graph.pools import MaxPool, Mean
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.recurrent import PackedLoop
from str_triton.deploy.sparse.runtime.trial import try_out
from str_triton.native import build

CUTS = [
    Choice("sparse", width, tiles, blocks) for width, tiles, blocks in ((4, 1, 1), (1, 3, 1), (8, 2, 3), (5, 100, 2))
]


def thinned(*shape: int, density: float) -> Tensor:
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    weight[1::3] = 0  # Some channels are empty.
    return weight


def convolution(weight: Tensor, stride=1, padding=0, dilation=1, groups=1, clamp=(-float("inf"), float("inf"))):
    pairs = [(value, value) if isinstance(value, int) else value for value in (stride, padding, dilation)]
    return Convolution("y", ["x"], weight, torch.randn(weight.shape[0]), clamp, "y", *pairs, groups)


def run(library: ctypes.CDLL, nodes: list, x: Tensor, choice: Choice) -> Tensor:
    """The value of the last node, with every layer by the kernels."""
    graph = Graph([Input("x", []), *nodes], [Ref(nodes[-1].name)])
    plan = Plan(graph, try_out(graph, [x]), {node.name: choice for node in graph.layers()}, library)
    assert not any(task.kind == "torch" and task.node.name != "x" for task in plan.tasks)
    plan.run([torch.randn_like(x)])  # What it leaves behind must not show.
    return plan.run([x])[nodes[-1].name]


def expected(node: Convolution, x: Tensor) -> Tensor:
    weight, bias = node.weight.double(), node.bias.double()
    y = F.conv2d(x.double(), weight, bias, node.stride, node.padding, node.dilation, node.groups)
    return y.clamp(*node.clamp).float()


GEOMETRIES = [
    # kernel, stride, padding, dilation
    (1, 1, 0, 1),
    (1, 2, 0, 1),
    (1, 1, 1, 1),
    (3, 1, 1, 1),
    (3, 1, 0, 1),
    (3, 2, 1, 1),
    (3, 3, 2, 1),
    (5, 2, 2, 1),
    (7, 2, 3, 1),
    (3, 1, 2, 2),
    (3, 2, 2, 2),
    ((1, 3), (1, 2), (0, 1), 1),
    ((5, 1), (2, 1), (3, 0), 1),
    (2, 2, 0, 1),
    (4, 1, 5, 1),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
@pytest.mark.parametrize("size", [(1, 13, 17), (3, 8, 9)])
def test_convolutions(kernels, kernel, stride, padding, dilation, size):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(size[0], 6, *size[1:])
    for (density, groups), choice in zip(itertools.product((0.3, 1.0), (1, 2)), CUTS, strict=True):
        node = convolution(thinned(10, 6 // groups, *kernel, density=density), stride, padding, dilation, groups)
        torch.testing.assert_close(run(kernels, [node], x, choice), expected(node, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", CUTS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_cuts_and_densities(kernels, choice, density):
    node = convolution(thinned(37, 24, 3, 3, density=density), padding=1, clamp=(0.0, 6.0))
    x = torch.randn(2, 24, 11, 14)
    torch.testing.assert_close(run(kernels, [node], x, choice), expected(node, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", range(1, 18))
def test_every_width(kernels, width):
    node = convolution(thinned(3, 4, 3, 3, density=0.5), padding=1)
    x = torch.randn(1, 4, 20, 21)
    torch.testing.assert_close(
        run(kernels, [node], x, Choice("sparse", width)), expected(node, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_depthwise(kernels, size, stride):
    node = convolution(thinned(24, 1, size, size, density=0.6), stride, size // 2, groups=24, clamp=(0.0, 6.0))
    x = torch.randn(2, 24, 15, 12)
    torch.testing.assert_close(run(kernels, [node], x, CUTS[0]), expected(node, x), rtol=1e-5, atol=1e-5)


def chain(*geometries: tuple[int, int, int], channels: int = 6) -> list[Convolution]:
    """Convolutions in a row, each (kernel, stride, padding)."""
    nodes = []
    for number, (kernel, stride, padding) in enumerate(geometries):
        node = convolution(thinned(channels, channels, kernel, kernel, density=0.5), stride, padding)
        node.name, node.inputs = f"y{number}", [f"y{number - 1}" if number else "x"]
        nodes.append(node)
    return nodes


@pytest.mark.parametrize(
    "geometries",
    [
        [(3, 1, 1), (1, 1, 0), (3, 2, 1), (1, 1, 0), (3, 1, 1)],
        [(1, 1, 0), (1, 1, 0), (3, 2, 1)],  # Pointwise layers work on the phases that the last one reads.
        [(3, 2, 1), (3, 2, 1), (5, 1, 2)],
        [(3, 1, 0), (5, 1, 2), (3, 1, 0)],  # One frame for images of several sizes.
        [(3, 1, 0), (3, 1, 1), (5, 1, 2), (3, 1, 0), (3, 1, 1)],  # A smaller image must not lie where a larger one was.
        [(2, 1, 1), (2, 1, 1), (2, 1, 0), (2, 1, 0), (3, 1, 1)],
        [(7, 4, 3), (1, 1, 0), (2, 3, 0)],
    ],
)
def test_layers_in_a_row(kernels, geometries):
    nodes, x = chain(*geometries), torch.randn(2, 6, 29, 34)
    y = x
    for node in nodes:
        y = expected(node, y)
    for choice in CUTS:
        atol = max(1e-4, 1e-5 * float(y.abs().max()))
        torch.testing.assert_close(run(kernels, nodes, x, choice), y, rtol=1e-4, atol=atol)


def test_a_residual_joins_before_the_activation(kernels):
    first, second = chain((3, 1, 1), (3, 1, 1))
    first.clamp = second.clamp = (0.0, float("inf"))
    second.inputs = ["y0", "x"]
    x = torch.randn(2, 6, 9, 10)
    inner = F.conv2d(expected(first, x).double(), second.weight.double(), second.bias.double(), padding=1)
    torch.testing.assert_close(
        run(kernels, [first, second], x, CUTS[2]), (inner + x).relu().float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
def test_max_pool_and_mean(kernels, kernel, stride, padding):
    (node,) = chain((3, 1, 1))
    node.clamp = (0.0, float("inf"))
    pairs = [(value, value) for value in (kernel, stride, padding, 1)]
    x = torch.randn(2, 6, 16, 19)
    pooled = F.max_pool2d(expected(node, x), kernel, stride, padding)
    got = run(kernels, [node, MaxPool("p", ["y0"], *pairs)], x, CUTS[1])
    torch.testing.assert_close(got, pooled, rtol=1e-5, atol=1e-5)
    got = run(kernels, [node, MaxPool("p", ["y0"], *pairs), Mean("m", ["p"])], x, CUTS[1])
    torch.testing.assert_close(got, pooled.mean((2, 3)), rtol=1e-5, atol=1e-5)


def linear(outputs: int, inputs: int, density: float = 0.5, name: str = "y", x: str = "x") -> Linear:
    weight = thinned(outputs, inputs, density=density)
    return Linear(name, [x], weight, torch.randn(outputs), (0.0, float("inf")), name)


def expected_linear(node: Linear, x: Tensor) -> Tensor:
    return F.linear(x.double(), node.weight.double(), node.bias.double()).relu().float()


# One row; fewer than a vector; with the rows of a square, and one more; features of whole vectors and not.
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 33), (33,), (2, 33), (2, 3, 33), (8, 32), (1, 9, 31), (3, 1, 5, 17), (16, 48), (3, 11, 30), (130, 5)]
)
def test_linear(kernels, shape, density):
    node = linear(21, shape[-1], density)
    x = torch.randn(shape)
    for choice in CUTS:
        got = run(kernels, [node], x, choice)
        torch.testing.assert_close(got, expected_linear(node, x), rtol=1e-5, atol=1e-5)


def test_linear_layers_share_the_turned_input_and_pass_it_on(kernels):
    a, b = linear(40, 33, name="a"), linear(21, 33, name="b")
    c, d = linear(9, 40, name="c", x="a"), linear(7, 21, name="d", x="b")
    x = torch.randn(5, 7, 33)
    graph = Graph([Input("x", []), a, b, c, d], [Ref("c"), Ref("d"), Ref("a")])
    plan = Plan(graph, try_out(graph, [x]), {node.name: CUTS[1] for node in graph.layers()}, kernels)
    plan.run([torch.randn_like(x)])
    values = plan.run([x])
    assert [task.kind for task in plan.tasks].count("copy") == 4  # x once, and three outputs
    wanted = {"a": expected_linear(a, x), "c": expected_linear(c, expected_linear(a, x))}
    wanted["d"] = expected_linear(d, expected_linear(b, x))
    for name, value in wanted.items():
        torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [12, 160])  # 160: images of a batch run one by one
def test_linear_layers_between_convolutions(kernels, size):
    first, last = chain((3, 1, 1), (3, 1, 1))
    middle = linear(size, size, 0.1, "m", "y0")
    last.inputs = ["m", "y0"]  # An image and a residual that have different forms.
    x = torch.randn(2, 6, size, size)
    inner = expected(first, x)
    own = F.conv2d(expected_linear(middle, inner).double(), last.weight.double(), last.bias.double(), padding=1)
    for choice in CUTS:
        got = run(kernels, [first, middle, last], x, choice)
        torch.testing.assert_close(got, (own + inner).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(kernels, name):
    """From far below where they vanish to far beyond where they are the identity, at infinities, and NaN."""
    x = torch.cat([torch.linspace(-120, 120, 997), torch.linspace(-6, 6, 1000), torch.tensor([math.nan, math.inf])])
    want = ACTIVATIONS[name](x.double()).float()
    pointwise = Convolution("y", ["x"], torch.ones(1, 1, 1, 1), torch.zeros(1), activation=name)
    got = run(kernels, [pointwise], x.view(1, 1, 1, -1), CUTS[0]).flatten()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    one, many = (Linear("y", ["x"], torch.eye(9), torch.zeros(9), activation=name) for _ in range(2))
    rows = x[900:1080].view(20, 9)
    torch.testing.assert_close(run(kernels, [many], rows, CUTS[2]).flatten(), want[900:1080], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run(kernels, [one], rows[3], CUTS[2]), want[927:936], rtol=1e-6, atol=1e-6)


def test_an_activation_follows_the_residual_and_the_clamp(kernels):
    (node,) = chain((3, 1, 1))
    node.inputs, node.clamp, node.activation = ["x", "x"], (-0.5, 0.7), "sigmoid"
    x = torch.randn(2, 6, 9, 10)
    inner = F.conv2d(x.double(), node.weight.double(), node.bias.double(), padding=1) + x
    want = inner.clamp(-0.5, 0.7).sigmoid().float()
    torch.testing.assert_close(run(kernels, [node], x, CUTS[1]), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(node.run({"x": x}), want, rtol=1e-5, atol=1e-5)
    # What the activation makes of the zeros around an image must not reach the next layer.
    last = chain((3, 1, 1))[0]
    last.name, last.inputs = "z", ["y0"]
    got = run(kernels, [node, last], x, CUTS[1])
    torch.testing.assert_close(got, expected(last, want), rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_reach_what_reads_them_and_nothing_else(kernels):
    (node,) = chain((3, 1, 1))
    node.weight = torch.eye(6).view(6, 6, 1, 1) * torch.ones(3, 3)
    node.clamp = (0.0, 6.0)
    x = torch.randn(1, 6, 12, 13)
    x[0, 2, 5, 5], x[0, 3, 11, 12], x[0, 4, 0, 0] = float("nan"), float("inf"), -float("inf")
    got = run(kernels, [node], x, CUTS[0])
    alone = F.conv2d(x[:, 2:3], torch.ones(1, 1, 3, 3), node.bias[2:3], padding=1).clamp(0, 6)
    torch.testing.assert_close(got[:, 2:3], alone, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert int(got.isnan().sum()) == 9
    assert got[0, 3, 10:, 11:].eq(6).all()
    assert got[0, 4, :2, :2].eq(0).all()


@pytest.mark.parametrize("images", [1, 2])
def test_tiles_are_shared_by_the_planes_and_images(kernels, images):
    """The first layer writes the four phases that the second one reads. Eight tiles are two for each phase."""
    nodes, x = chain((1, 1, 0), (3, 2, 1)), torch.randn(images, 6, 40, 44)
    graph = Graph([Input("x", []), *nodes], [Ref(nodes[-1].name)])
    plan = Plan(graph, try_out(graph, [x]), {node.name: Choice("sparse", 8, 8) for node in nodes}, kernels)
    segment, number = plan.operation(nodes[0].name)
    operation = segment.operations[number][0]
    assert (operation.planes, operation.images) == (4, images)
    assert (operation.tiles, operation.items) == (2 // images, 8)


def test_rows_are_split_into_phases_up_to_their_borders(kernels):
    """Planes of few columns, and rows that end within a vector; a pool's border is minus infinity."""
    first, plain = chain((1, 1, 0), (3, 1, 1), channels=3)
    pool = MaxPool("p", ["y0"], (3, 3), (2, 2), (1, 1), (1, 1))
    strided = convolution(thinned(4, 3, 3, 3, density=1.0), 2, 1)
    for size in itertools.product((2, 3, 9), (2, 3, 7, 14, 15, 31, 33, 64)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(run(kernels, [strided], x, CUTS[0]), expected(strided, x), rtol=1e-5, atol=1e-5)
        pooled = F.max_pool2d(expected(first, x), 3, 2, 1)
        torch.testing.assert_close(run(kernels, [first, plain, pool], x, CUTS[0]), pooled, rtol=1e-5, atol=1e-5)


def test_threads_give_the_same_bits(kernels):
    nodes, x = chain((3, 1, 1), (1, 1, 0), (3, 2, 1)), torch.randn(2, 6, 29, 34)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(kernels, nodes, x, CUTS[3]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_threads_that_sleep_at_every_stage(kernels, tmp_path: Path):
    """A thread that waits neither spins nor yields: it sleeps, and is woken for every stage and every step."""
    flags = ("-O1", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-DSPINS=0", "-DYIELDS=0")
    library = build.load(build.build(tmp_path, (flags, flags[:4])))
    nodes, x = chain((3, 1, 1), (1, 1, 0), (3, 2, 1)), torch.randn(2, 6, 29, 34)
    loop = Recurrent("y", ["x", "h"], torch.randn(99, 9), torch.randn(99), v=torch.randn(33, 9) / 33)
    packed = [PackedLoop(loop, lib) for lib in (kernels, library)]
    sequence, h = torch.randn(80, 1, 99), [torch.zeros(1, 33)]
    before = torch.get_num_threads()
    try:
        wanted, state = run(kernels, nodes, x, CUTS[3]), packed[0].run(sequence, h, False)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for _ in range(20):
                torch.testing.assert_close(run(library, nodes, x, CUTS[3]), wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(packed[1].run(sequence, h, True), state, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


WIDE = ("-DSTR_TRITON_SIXTEEN_LANES", "-mno-avx512f", "-march=native")  # Vectors of 16 floats, each in two registers.


@pytest.mark.parametrize("flags", [("-mno-avx512f", "-march=native"), ("-msse2",), (), WIDE], ids=str)
def test_other_processors(kernels, tmp_path: Path, flags: tuple[str, ...]):
    """Other widths of vectors, without OpenMP: the same sums."""
    options = ("-O1", "-std=gnu11", "-fPIC", "-shared", *reversed(flags))
    try:
        library = build.load(build.build(tmp_path, (options,)))
    except build.BuildError as error:
        pytest.skip(f"the compiler does not know {flags}: {error}")
    nodes, x = chain((3, 1, 1), (1, 1, 0), (3, 2, 1)), torch.randn(2, 6, 29, 34)
    y = x
    for node in nodes:
        y = expected(node, y)
    for width in (*range(1, 9), 14):  # 14: a file may come from a processor with more registers.
        got = run(library, nodes, x, Choice("sparse", width, 3, 2))
        torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4)
    for rows in (1, 3, 19, 33):
        node, x = linear(21, 35), torch.randn(rows, 35)
        got = run(library, [node], x, Choice("sparse", 2, 3, 2))
        torch.testing.assert_close(got, expected_linear(node, x), rtol=1e-5, atol=1e-5)
        node.clamp, node.activation = (-math.inf, math.inf), "gelu"
        got, want = run(library, [node], x, Choice("sparse", 2, 3, 2)), node.run({"x": x.double().float()})
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
