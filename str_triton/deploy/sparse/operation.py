"""Compiled networks as one opaque operation, which torch.compile and torch.export do not look into."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.graph.signature import Unfit
from str_triton.deploy.sparse.model import NETWORKS, SparseModel
from str_triton.deploy.sparse.surroundings import refuse_gradients

torch.library.define("str_triton::sparse_network", "(Tensor[] inputs, int network) -> Tensor[]")


@torch.library.impl("str_triton::sparse_network", "CompositeExplicitAutograd")
def _sparse_network(inputs: list[Tensor], network: int) -> list[Tensor]:
    model = NETWORKS[network]
    leaves = _leaves(model, inputs)
    outputs = model.run(leaves) if _fits(model, leaves) else _by_source(model, leaves, model.by_source)
    # The operation says that its results share no memory with its arguments or with each other.
    seen = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    results = []
    for output in _tensors(model, outputs):
        place = output.untyped_storage().data_ptr()
        results.append(output.clone() if place in seen else output)
        seen.add(place)
    return results


@torch.library.register_fake("str_triton::sparse_network")
def _fake_sparse_network(inputs: list[Tensor], network: int) -> list[Tensor]:
    model = NETWORKS[network]
    leaves = _leaves(model, inputs)
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    allowed = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        if _fits(model, leaves):  # For open sizes, the answer becomes a guard of the trace.
            outputs, _ = model.graph.run(inputs)
        else:
            outputs = _by_source(model, leaves, model.source)
        return [output.contiguous().clone() for output in _tensors(model, outputs)]
    finally:
        mode.allow_non_fake_inputs = allowed


@torch.library.register_vmap("str_triton::sparse_network")
def _batched_sparse_network(
    info: Any, in_dims: tuple, inputs: list[Tensor], network: int
) -> tuple[list[Tensor], list[int]]:
    """Call the network for each slice: its graph may depend on the values or on the number of dimensions."""
    dims = in_dims[0]
    results = []
    for i in range(info.batch_size):
        given = [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims, strict=True)]
        refuse_gradients(given)
        results.append(torch.ops.str_triton.sparse_network(given, network))
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


def _leaves(model: SparseModel, inputs: list[Tensor]) -> list[Any]:
    given = iter(inputs)
    return [next(given) if leaf.dtype is not None else leaf.value for leaf in model.signature.leaves]


def _fits(model: SparseModel, leaves: list[Any]) -> bool:
    """Check whether the network holds for these arguments; raises Unfit where its model cannot take them either."""
    if model.source is None or model.state():  # The state of a trace is not the model's.
        model.signature.check(leaves)
        return True
    return model.signature.fits(leaves)


def _by_source(model: SparseModel, leaves: list[Any], call: Callable[..., Any]) -> list[Any]:
    """Return the outputs of the model itself, flat."""
    args, kwargs = pytree.tree_unflatten(leaves, model.signature.structure)
    outputs, structure = pytree.tree_flatten(call(*args, **kwargs))
    pairs = zip(outputs, model.graph.outputs, strict=False)
    if structure != model.signature.returns or any(not isinstance(b, Ref) and a != b for a, b in pairs):
        raise Unfit("the network was compiled for arguments for which its model returns something else")
    return outputs


def _tensors(model: SparseModel, outputs: list[Any]) -> list[Tensor]:
    """Return the outputs that are no constants."""
    return [output for output, value in zip(outputs, model.graph.outputs, strict=True) if isinstance(value, Ref)]
