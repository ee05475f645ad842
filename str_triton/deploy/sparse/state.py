"""The buffers of a model, which its calls may change."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of a model as they were, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self._values = [
            (f"{path}.{name}".lstrip("."), module, name, value, None if value is None else value.clone())
            for path, module in model.named_modules()
            for name, value in module._buffers.items()
        ]

    def changed(self) -> set[str]:
        """Return the names of the buffers that were replaced or hold other values."""
        return {
            label
            for label, module, name, tensor, value in self._values
            if module._buffers[name] is not tensor
            or (tensor is not None and not torch.equal(tensor.nan_to_num(), value.nan_to_num()))
        }

    def copied(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with the buffers as they were; the model does not change."""
        copied = copy.deepcopy(model)
        for label, _, name, _, value in self._values:
            owner = copied.get_submodule(label.removesuffix(name).rstrip("."))
            owner._buffers[name] = None if value is None else value.clone()
        return copied

    def restore(self) -> None:
        for _, module, name, tensor, value in self._values:
            if tensor is not None:
                tensor.copy_(value)
            module._buffers[name] = tensor


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
