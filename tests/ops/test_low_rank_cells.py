"""Properties of every low-rank recurrent op on the CPU: the literal equations, lengths, direction, dtypes, traces."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from str_triton.ops import schedule
from str_triton.ops.low_rank_cell import CELLS
from tests.ops.low_rank_cases import LENGTHS, TOLERANCE, Case, assert_matches, differentiate, example, expected, op
from tests.ops.soft_threshold_cases import poisoned_allocations

OPS = torch.ops.str_triton
DIRECTION = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
EVERY_LENGTHS = pytest.mark.parametrize("lengths", LENGTHS)


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


@EVERY_CELL
@EVERY_LENGTHS
@DIRECTION
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_literal_equations(cell, lengths, reverse, bias):
    case = example(cell, lengths=lengths, reverse=reverse, bias=bias)
    assert_matches(differentiate(op(cell), case), expected(case), TOLERANCE[torch.float64])


@EVERY_CELL
@EVERY_LENGTHS
@DIRECTION
def test_pieces_of_time(cell, lengths, reverse, monkeypatch):
    """Chunks of two steps, the last of one: what begins and ends within each is right."""
    monkeypatch.setattr(schedule, "CHUNK", 2 * 4 * 6)
    case = example(cell, steps=7, lengths=lengths, reverse=reverse)
    assert_matches(differentiate(op(cell), case), expected(case), TOLERANCE[torch.float64])


@EVERY_CELL
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 5, 0), (3, 2, 4, 7), (40, 3, 33, 17)], ids=str)
def test_sizes(cell, size):
    case = example(cell, *size, lengths="any order")
    assert_matches(differentiate(op(cell), case), expected(case), TOLERANCE[torch.float64])


@EVERY_CELL
@EVERY_LENGTHS
@pytest.mark.parametrize("size", [(3, 0, 4, 2), (3, 2, 0, 2)], ids=str)
def test_nothing_at_all(cell, lengths, size):
    case = example(cell, *size, lengths=lengths)
    got = differentiate(op(cell), case)
    assert got["outputs"].shape == (3, size[1], size[2])
    assert all(got[f"grad of {name}"].shape == tensor.shape for name, tensor in case.tensors.items())
    assert not any(got[f"grad of {name}"].any() for name in ("u", "m", "v"))


# What each cell's `_coefficients` writes: the blocks of its first arguments.
COEFFICIENTS = {
    "gru": (("r", "z", "recurrent n"), ("n",)),
    "lstm": ("ifgo", "c"),
    "fastgrnn": (("z and c",), "z"),
    "mgu": (("f", "recurrent n"), "n", "h"),
}
EVERY_BLOCK = [
    (cell, buffer, block)
    for cell, buffers in COEFFICIENTS.items()
    for buffer, blocks in enumerate(buffers)
    for block in blocks
]


def test_every_cell_has_coefficients():
    assert COEFFICIENTS.keys() == CELLS.keys()


@pytest.mark.parametrize(("cell", "buffer", "block"), EVERY_BLOCK)
def test_a_wrong_derivative_would_show(cell, buffer, block, monkeypatch):
    """One gate's coefficient is off by a thousandth: the comparison with the literal equations fails."""
    module, blocks = importlib.import_module(f"str_triton.ops.cells.{cell}"), COEFFICIENTS[cell][buffer]
    correct = module._coefficients

    def wrong(*buffers):
        correct(*buffers)
        buffers[buffer].chunk(len(blocks), 2)[blocks.index(block)].mul_(1.001)

    case = example(cell, lengths="any order")
    monkeypatch.setattr(module, "_coefficients", wrong)
    with pytest.raises(AssertionError, match="grad of"):
        assert_matches(differentiate(op(cell), case), expected(case), 1e-6)


@EVERY_CELL
@DIRECTION
def test_gradcheck(cell, reverse):
    case = example(cell, 3, 2, 3, 2, lengths="any order", reverse=reverse)
    names, tensors = zip(*case.tensors.items(), strict=True)

    def function(*tensors):
        return tuple(replace(case, tensors=dict(zip(names, tensors, strict=True))).call(op(cell)))

    assert torch.autograd.gradcheck(function, tuple(tensor.requires_grad_() for tensor in tensors))


@EVERY_CELL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(cell, dtype):
    """Against float64 from the same rounded numbers; factors and biases may have a dtype of their own."""
    case = example(cell, 8, 5, 16, 8, lengths="any order", dtype=dtype)
    got = differentiate(op(cell), case)
    assert_matches(got, expected(case), TOLERANCE[dtype])
    wide = {name: t if name in ("gates_x", "h0", "c0") else t.double() for name, t in case.tensors.items()}
    mixed = differentiate(op(cell), replace(case, tensors=wide))
    assert {name: value.dtype for name, value in mixed.items()} == {
        name: torch.float64 if name.removeprefix("grad of ") in wide.keys() - {"gates_x", "h0", "c0"} else dtype
        for name in mixed
    }
    assert_matches(mixed, expected(case), TOLERANCE[dtype])


@EVERY_CELL
@DIRECTION
def test_nothing_behind_the_end(cell, reverse):
    """Outputs and gradients are 0 there, and whatever gates_x and the outputs' gradient hold there changes nothing."""
    case = example(cell, 6, lengths="any order", reverse=reverse)
    case.lengths = torch.tensor([3, 6, 1, 4])
    got = differentiate(op(cell), case)
    padding = torch.arange(6)[:, None] >= case.lengths
    assert not got["outputs"][padding].any()
    assert not got["grad of gates_x"][padding].any()
    case.tensors["gates_x"][padding] = torch.nan
    case.grads[0][padding] = torch.nan
    again = differentiate(op(cell), case)
    assert all(torch.equal(again[name], value) for name, value in got.items())


@EVERY_CELL
@EVERY_LENGTHS
def test_reverse_is_each_sequence_flipped(cell, lengths):
    case = example(cell, 6, lengths=lengths)
    index = torch.arange(6)[:, None].expand(6, 4)
    ends = torch.full((4,), 6) if case.lengths is None else case.lengths
    index = torch.where(index < ends, ends - 1 - index, index)[..., None]
    flip = lambda x: x.gather(0, index.expand_as(x))  # noqa: E731
    flipped = replace(case, tensors=case.tensors | {"gates_x": flip(case.tensors["gates_x"])}, reverse=True)
    outputs, *states = case.call(op(cell))
    flipped_outputs, *flipped_states = flipped.call(op(cell))
    torch.testing.assert_close(flip(flipped_outputs), outputs)
    torch.testing.assert_close(flipped_states, states)


@EVERY_CELL
@DIRECTION
def test_layouts(cell, reverse):
    """No argument needs to be contiguous, nor has a gradient to be."""
    case = example(cell, lengths="any order", reverse=reverse)
    want = differentiate(op(cell), case)
    strided = {name: torch.stack((t, t), -1)[..., 0] for name, t in case.tensors.items()}
    case = replace(case, tensors=strided, grads=[grad.mT.contiguous().mT for grad in case.grads])
    assert_matches(differentiate(op(cell), case), want, 1e-14)


@EVERY_CELL
def test_the_same_bits(cell):
    case = example(cell, 20, 8, 32, 8, lengths="any order", dtype=torch.float32)
    first, second = differentiate(op(cell), case), differentiate(op(cell), case)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(case.call(op(cell)), first.values(), strict=False))


@EVERY_CELL
@pytest.mark.parametrize("where", ["gates_x", "h0", "m"])
def test_nan_in_nan_out(cell, where):
    case = example(cell, lengths="any order")
    case.lengths = torch.tensor([5, 5, 2, 3])
    case.tensors[where][{"gates_x": (2, 0), "h0": (0, 0), "m": 0}[where]] = torch.nan
    outputs, h, *_ = case.call(op(cell))
    hit = {"gates_x": outputs[2:, 0], "h0": outputs[:, 0], "m": outputs[:2]}[where]
    assert hit.isnan().all()
    assert h[0].isnan().all()
    others = {"gates_x": outputs[:, 1:], "h0": outputs[:, 1:], "m": outputs[3:, 2:]}[where]
    assert others.isfinite().all()


@EVERY_CELL
def test_only_some_gradients(cell):
    case = example(cell)
    want = differentiate(op(cell), case)
    for name, tensor in case.tensors.items():
        leaf = tensor.clone().requires_grad_()
        results = replace(case, tensors=case.tensors | {name: leaf}).call(op(cell))
        (grad,) = torch.autograd.grad(results, leaf, case.grads)
        assert torch.equal(grad, want[f"grad of {name}"])
    leaf = case.tensors["h0"].clone().requires_grad_()
    final = replace(case, tensors=case.tensors | {"h0": leaf}).call(op(cell))[1]
    assert torch.autograd.grad(final.sum(), leaf)[0].any(), "the outputs' gradient may be missing"


@EVERY_CELL
def test_differentiable_once(cell):
    case = example(cell)
    leaf = case.tensors["gates_x"].requires_grad_()
    (grad,) = torch.autograd.grad(case.call(op(cell))[0].square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@EVERY_CELL
@pytest.mark.parametrize("lengths", ["all", "any order"])
@DIRECTION
def test_opcheck(cell, lengths, reverse):
    case = example(cell, lengths=lengths, reverse=reverse)
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "low_rank" in str(function):
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Record():
        differentiate(op(cell), case)
        with torch.no_grad():
            case.call(op(cell))
    assert [str(function) for function, _ in calls] == [
        f"str_triton.low_rank_rnn{suffix}.default" for suffix in ("", "_backward", "")
    ]
    for function, args in calls:
        torch.library.opcheck(function, tree_map_only(torch.Tensor, torch.Tensor.detach, args))


@EVERY_CELL
@pytest.mark.parametrize("lengths", ["all", "any order"])
def test_compiled_in_one_graph(cell, lengths):
    torch.compiler.reset()
    case = example(cell, lengths=lengths, dtype=torch.float32)
    compiled = torch.compile(op(cell), fullgraph=True, backend="aot_eager", dynamic=False)
    eager, traced = (differentiate(function, case) for function in (op(cell), compiled))
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


@EVERY_CELL
def test_torch_func(cell):
    """`grad`, `vmap` of it over everything, and over the gradient alone."""
    cases = [example(cell, lengths="any order") for _ in range(3)]
    names, rest = tuple(cases[0].tensors), {"cell": cell, "lengths": cases[0].lengths, "reverse": False}

    def loss(tensors, grads):
        results = Case(tensors=dict(zip(names, tensors, strict=True)), grads=[], **rest).call(op(cell))
        return sum((result * grad).sum() for result, grad in zip(results, grads, strict=True))

    want = []
    for case in cases:
        found = differentiate(op(cell), replace(case, lengths=rest["lengths"]))
        want.append(tuple(found[f"grad of {name}"] for name in names))
    tensors = tuple(torch.stack(kind) for kind in zip(*(case.tensors.values() for case in cases), strict=True))
    grads = [torch.stack(kind) for kind in zip(*(case.grads for case in cases), strict=True)]
    torch.testing.assert_close(
        torch.func.grad(loss)(tuple(cases[0].tensors.values()), cases[0].grads), want[0], rtol=1e-12, atol=1e-12
    )
    every = torch.func.vmap(torch.func.grad(loss))(tensors, grads)
    torch.testing.assert_close(every, tuple(map(torch.stack, zip(*want, strict=True))), rtol=1e-12, atol=1e-12)
    one = tuple(cases[0].tensors.values())
    every = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(one, grads)
    for i, case in enumerate(cases):
        alone = torch.func.grad(loss)(one, case.grads)
        torch.testing.assert_close(tuple(part[i] for part in every), alone, rtol=1e-12, atol=1e-12)


@EVERY_CELL
def test_under_autocast(cell):
    case = example(cell, dtype=torch.float32)
    want = differentiate(op(cell), case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = differentiate(op(cell), case)
    assert_matches(got, want, 1e-6)
