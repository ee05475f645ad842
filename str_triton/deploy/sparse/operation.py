"""Compiled networks as one opaque operation, which torch.compile and torch.export go around."""

from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.model import NETWORKS, SparseModel

torch.library.define("str_triton::sparse_network", "(Tensor[] inputs, int network) -> Tensor[]")


@torch.library.impl("str_triton::sparse_network", "CompositeExplicitAutograd")
def _sparse_network(inputs: list[Tensor], network: int) -> list[Tensor]:
    model = NETWORKS[network]
    found = [
        output
        for output, value in zip(model.run(_leaves(model, inputs)), model.graph.outputs, strict=True)
        if isinstance(value, Ref)
    ]
    # The operation says that its results share no memory with its arguments or with each other.
    seen = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    results = []
    for output in found:
        place = output.untyped_storage().data_ptr()
        results.append(output.clone() if place in seen else output)
        seen.add(place)
    return results


@torch.library.register_fake("str_triton::sparse_network")
def _fake_sparse_network(inputs: list[Tensor], network: int) -> list[Tensor]:
    model = NETWORKS[network]
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    allowed = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        outputs, _ = model.graph.run(inputs)
    finally:
        mode.allow_non_fake_inputs = allowed
    return [
        output.contiguous().clone()
        for output, value in zip(outputs, model.graph.outputs, strict=True)
        if isinstance(value, Ref)
    ]


def _leaves(model: SparseModel, inputs: list[Tensor]) -> list[Any]:
    given = iter(inputs)
    return [next(given) if leaf.dtype is not None else leaf.value for leaf in model.signature.leaves]
