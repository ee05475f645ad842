"""A layer as the product of a compressed sparse matrix, by torch.sparse."""

import warnings
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.graph.nodes import Convolution, Layer, Linear

MOST = 0.5  # the density up to which the format can win


class Csr(Execution):
    """torch.sparse for layers that are one product of their weight as a matrix with their input."""

    name = "csr"

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        is_product = type(node) is Linear or (type(node) is Convolution and node.is_pointwise and node.groups == 1)
        return is_product and node.inputs[0] in shapes and int(node.weight.count_nonzero()) < MOST * node.weight.numel()

    def run(self, node: Layer, values: dict[str, Any]) -> Tensor:
        x = values[node.inputs[0]]
        if x.numel() == 0:
            return node.run(values)
        weight = node.prepare(self.name, _to_csr)
        if isinstance(node, Linear):
            y = torch.sparse.mm(weight, x.reshape(-1, x.shape[-1]).t().contiguous()).t()
            return node.finish(y.reshape(*x.shape[:-1], -1) + node.bias, values)
        images = [torch.sparse.mm(weight, image.reshape(image.shape[0], -1)) for image in x]
        y = torch.stack(images) if len(images) != 1 else images[0].unsqueeze(0)
        return node.finish(y.add_(node.bias.view(-1, 1)).view(x.shape[0], -1, *x.shape[2:]), values)


def _to_csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return weight.flatten(1).to_sparse_csr()
