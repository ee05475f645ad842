"""The buffers of a model, which its calls may change."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def fresh(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the same parameters: its calls leave nothing in the model."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def changed_buffers(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> set[str]:
    """Return the names of the buffers that a call replaces or gives other values."""
    copied, before = fresh(model), _buffers(model)
    own = _buffers(copied)
    copied(*args, **kwargs)
    return {
        name
        for name, value in _buffers(copied).items()
        if value is not own.get(name)
        or (value is not None and not torch.equal(value.nan_to_num(), before[name].nan_to_num()))
    }


def _buffers(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in module._buffers.items()
    }


def change_in_place(model: nn.Module, names: set[str]) -> None:
    """Make a model's calls change these buffers in place where its forward would replace them by other tensors.

    torch.export loses a replacement that happens in a submodule.
    """
    places = _Places(names)
    model.register_forward_pre_hook(places.remember)
    model.register_forward_hook(places.put_back)


class _Places:
    """Hooks that copy a buffer's new value to the tensor that was there before the call."""

    def __init__(self, names: set[str]) -> None:
        self.names = sorted(names)
        self.before: dict[str, Tensor] = {}

    def remember(self, module: nn.Module, args: Any) -> None:
        found = dict(module.named_buffers())
        self.before = {name: found[name] for name in self.names if name in found}

    def put_back(self, module: nn.Module, args: Any, result: Any) -> None:
        for name, old in self.before.items():
            new = module.get_buffer(name)
            if new is not old and (new.shape, new.dtype) == (old.shape, old.dtype):
                old.copy_(new)
                path, _, last = name.rpartition(".")
                module.get_submodule(path)._buffers[last] = old
        self.before = {}
