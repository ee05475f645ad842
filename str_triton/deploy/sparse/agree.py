"""The comparison of a compiled network with its model."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from str_triton.deploy.sparse.calls import clone, resized
from str_triton.deploy.sparse.graph.nodes import Graph, State
from str_triton.deploy.sparse.graph.pools import AvgPool, Mean
from str_triton.deploy.sparse.graph.quantized import QuantizedConvolution, QuantizedLinear, QuantizedMean
from str_triton.deploy.sparse.graph.signature import Signature
from str_triton.deploy.sparse.quiet import quiet
from str_triton.deploy.sparse.state import fresh

# The first three are limits of differences, relative to the largest value.
ROUNDING = 1e-4  # between two results in float32
DOUBT = 1e-2  # between a model in float32 and in float64: above this, float64 is no reference
FLIPS = 5e-2  # between quantized networks, some of whose codes are rounded the other way
SLACK = 10.0  # a network's error against float64 may be this many times the model's


@quiet()
def difference(
    model: nn.Module,
    network: Callable,
    calls: Sequence[tuple[tuple, dict]],
    prepared: Callable[[Any], Any] = clone,
) -> str | None:
    """Return how a network differs from its model in a sequence of calls; None if it differs only by rounding.

    A copy of the model is called with what `prepared` makes of the arguments. If it refuses other arguments than the
    first call's, the comparison ends.
    """
    copied = fresh(model)
    for number, call in enumerate(calls):
        theirs, ours = prepared(call), prepared(call)
        try:
            wanted = copied(*theirs[0], **theirs[1])
        except Exception as error:
            if call[0] is not calls[0][0]:
                return None
            return f"the model raises {type(error).__name__} when it is called again"
        try:
            found = network(*ours[0], **ours[1])
        except Exception as error:
            return f"it raises {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        if not agree((found, ours), (wanted, theirs), functools.partial(_exact, model, calls[: number + 1], prepared)):
            return "it gives other values"
    return None


def integer_difference(model: nn.Module, network: Callable, calls: Sequence[tuple[tuple, dict]]) -> str | None:
    """Return how a compiled network on integers differs from its reference in a sequence of calls; None: it does not.

    The outputs must be equal. If there are layers in float32, one of their values may be rounded to the next code. The
    difference may then be up to FLIPS times the largest value.
    """
    exact = is_integral(model.graph)
    for args, kwargs in calls:
        wanted, found = (pytree.tree_leaves(run(*clone(args), **clone(kwargs))) for run in (model, network))
        for ours, theirs in zip(found, wanted, strict=True):
            if not _alike(ours, theirs):
                return "other shapes"
            if isinstance(ours, Tensor) and not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
                error = float((ours - theirs).nan_to_num().abs().max() / theirs.nan_to_num().abs().max())
                if exact or not error <= FLIPS:
                    return f"by {error:.2g} of the largest value"
    return None


def is_integral(graph: Graph) -> bool:
    """Check that all layers of a graph run on integers, and all else is computed in the same way everywhere."""
    floats = (AvgPool, Mean)
    is_float = any(isinstance(node, floats) and not isinstance(node, QuantizedMean) for node in graph.nodes)
    return not is_float and all(isinstance(node, QuantizedConvolution | QuantizedLinear) for node in graph.layers())


def _exact(model: nn.Module, calls: Sequence[tuple[tuple, dict]], prepared: Callable[[Any], Any]) -> Any:
    """Return what the last call of the model in float64 gives, after the others; None where it cannot be computed."""
    try:
        doubled, result = copy.deepcopy(model).double(), None
        for call in calls:
            args, kwargs = given = prepared(pytree.tree_map(_double, call))
            result = doubled(*args, **kwargs), given
        return result
    except Exception:
        return None


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


def agree(found: Any, wanted: Any, exact: Callable[[], Any]) -> bool:
    """Check that two results are equal but for rounding; `exact` computes the result in float64, for doubtful cases."""
    ours, structure = pytree.tree_flatten(found)
    theirs, other = pytree.tree_flatten(wanted)
    if structure != other or not all(map(_alike, ours, theirs)):
        return False
    if all(map(_close, ours, theirs)):
        return True
    truth = pytree.tree_leaves(exact())
    return len(truth) == len(ours) and all(map(_as_close, ours, theirs, truth))


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    return a.shape == b.shape and a.dtype == b.dtype


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return a is b or not isinstance(a, int | float | str | bool) or a == b
    if a.is_complex():
        return all(map(_close, (a.real, a.imag), (b.real, b.imag)))
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=ROUNDING, atol=ROUNDING * scale, equal_nan=True)


def _as_close(a: Any, b: Any, truth: Any) -> bool:
    """Check that `a` differs from the truth by not much more than `b` does."""
    if _close(a, b):
        return True
    if not isinstance(truth, Tensor) or truth.shape != a.shape or not a.is_floating_point():
        return False
    errors = [float((value.double() - truth).nan_to_num(0.0, 0.0, 0.0).abs().max()) for value in (a, b)]
    scale = float(truth.nan_to_num(0.0, 0.0, 0.0).abs().max())
    # The exact value may be zero, as the mean over normalised values is: then both results are their own errors.
    is_reference = errors[1] <= DOUBT * scale or scale <= DOUBT * errors[1]
    return torch.equal(a.isfinite(), b.isfinite()) and errors[0] <= SLACK * errors[1] and is_reference


@quiet()
def takes_more(model: nn.Module, graph: Graph, signature: Signature, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Check whether the model takes arguments that the signature excludes, or for which the graph fails.

    Each has another size in one dimension, or in the first one of all tensors; only a size of zero may make the graph
    fail. An argument that is no tensor may always have another value.
    """
    flat, structure = pytree.tree_flatten((args, kwargs))
    if not all(isinstance(leaf, Tensor) for leaf in flat):
        return True
    places = [[(number, dim)] for number, given in enumerate(flat) for dim in range(given.dim())]
    if len(flat) > 1 and all(given.dim() for given in flat):
        places.append([(number, 0) for number in range(len(flat))])
    for place in places:
        olds = {flat[number].shape[dim] for number, dim in place}
        old = olds.pop()
        for size in {0, 1, 2, old + 1} - {old} if old and not olds else ():
            leaves = clone(flat)
            for number, dim in place:
                leaves[number] = flat[number].index_select(dim, torch.arange(size, device="cpu") % old)
            fits = signature.fits(leaves) and (size > 0 or _takes(graph.run, (leaves,), {}))
            if not fits and _takes(fresh(model), *pytree.tree_unflatten(leaves, structure)):
                return True
    return False


def same_values(
    model: nn.Module, graph: Graph, signature: Signature, calls: Sequence[tuple[tuple, dict[str, Any]]]
) -> bool:
    """Check that in each of these calls the graph gives what the model gives, and changes what the model changes."""
    states = {node.name: node.label for node in graph.nodes if isinstance(node, State) and node.name in graph.changes}
    places = [node.name for node in graph.inputs()]

    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = signature.only_tensors(signature.flatten(args, kwargs))
        outputs, changes = graph.run(inputs)
        for name in changes.keys() - states.keys():
            inputs[places.index(name)].copy_(changes[name])
        return pytree.tree_unflatten(outputs, signature.returns), [changes[name] for name in states]

    watched = _Watched(model, list(states.values()))
    return all(difference(watched, run, [call]) is None for call in calls)


@quiet()
def with_sizes_of_zero(
    model: nn.Module, graph: Graph, signature: Signature, args: tuple, kwargs: dict[str, Any]
) -> Signature:
    """Return a signature that takes empty tensors where, and only where, the graph gives what the model gives.

    torch.export does not tell: it refuses empty tensors for which an operation has an assertion, and takes those for
    which the model has a branch of its own. Each open size is set to zero, with the example's other sizes and larger
    ones.
    """
    olds = signature.values(pytree.tree_leaves((args, kwargs)))
    for name, old in olds.items():
        wider = signature.with_zero(name)
        larger = ({other: (n, n + 1)} for other, n in olds.items() if other != name)
        calls = [resized(args, kwargs, {name: (old, 0)} | sizes, signature.leaves) for sizes in ({}, *larger)]
        fitting = [call for call in calls if wider.fits(pytree.tree_leaves(call))]
        if fitting and same_values(model, graph, wider, fitting):
            signature = wider
        elif wider.guards == signature.guards:  # Otherwise a condition excludes zero already.
            signature = replace(signature, guards=[*signature.guards, f"{name} != 0"])
    return signature


class _Watched(nn.Module):
    """A model that also returns the buffers that its calls change."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs), [self.model.get_buffer(name) for name in self.names]


def _takes(model: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    try:
        model(*args, **kwargs)
    except Exception:
        return False
    return True
