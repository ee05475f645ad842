"""The tensors of a model to store: thresholds are applied, matrices in factors are compact."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from str_triton.nn import LowRankWeight, plain_state_dict, require_own_weights, thresholded_weights

State = dict[str, Tensor]
Products = dict[str, tuple[str, str]]  # the name of a matrix u v^T -> the names of u and v


def plain_state(model: nn.Module | Mapping[str, Tensor]) -> tuple[State, Products]:
    """Return the tensors to store, detached, in the model's order, and the names of matrices and their factors.

    The names are those of the plain model. A layer with a threshold gives the `weight` of its forward pass and no raw
    threshold. A `LowRankWeight` P with a threshold gives P.u and P.v of its surviving components, or P if that is not
    larger, as `compact()` does. One without a threshold gives its factors. Shared tensors stay shared. The model is not
    changed.

    Raises:
        TypeError: neither a module nor a mapping.
        ValueError: an entry that is not a dense tensor with values, or a thresholded weight that other code computes
            since `sparsify`, such as weight_norm or pruning; the message names it.
    """
    if isinstance(model, nn.Module):
        state, products = _state_of_module(model)
    elif isinstance(model, Mapping):
        state, products = plain_state_dict(model), {}
    else:
        raise TypeError(f"model must be a module or a mapping of names to tensors, got {type(model).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"the names of tensors must be texts, got {name!r}")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is {type(tensor).__name__}, not a tensor")
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"tensor {name!r} is lazy and has no values yet: run the model once before packing it")
        if tensor.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device and has no values")
        if tensor.layout is not torch.strided:
            raise ValueError(f"tensor {name!r} is of layout {tensor.layout}: only plain dense tensors can be packed")
    return {name: tensor.detach() for name, tensor in state.items()}, products


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile, which put a prefix on names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = original
        else:
            return model


def _state_of_module(model: nn.Module) -> tuple[State, Products]:
    require_own_weights(thresholded_weights(model))
    state = plain_state_dict(model.state_dict())
    products: Products = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, LowRankWeight) and f"{prefix}u" in state:
            products[path or "weight"] = f"{prefix}u", f"{prefix}v"
    return state, products
