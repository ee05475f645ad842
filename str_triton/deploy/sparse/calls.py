"""The calls of torch's that a network may make besides its layers: by name, so that a file can hold them."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * scale.view(shape) + shift.view(shape)


@dataclass(frozen=True)
class Method:
    """Calls a tensor's method of this name; not a lambda, which torch.save could not keep."""

    name: str

    @property
    def __name__(self) -> str:
        return f".{self.name}"

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, self.name)(*args, **kwargs)


ATTRIBUTES = ("T", "ndim", "shape")
_METHODS = (
    *("add", "add_", "chunk", "contiguous", "expand", "flatten", "mean", "mul", "mul_", "permute", "relu", "relu_"),
    *(
        "reshape",
        "sigmoid",
        "size",
        "softmax",
        "split",
        "squeeze",
        "sub",
        "sum",
        "tanh",
        "transpose",
        "unsqueeze",
        "view",
    ),
)
_OPERATORS = ("add", "floordiv", "getitem", "iadd", "imul", "mul", "neg", "sub", "truediv")
# The calls that a saved network may hold, by name: reading a file calls nothing else.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "affine": _affine,
    "getattr": lambda x, name: getattr(x, ATTRIBUTES[ATTRIBUTES.index(name)]),
    **{function.__name__: function for function in (torch.flatten, torch.cat, torch.clamp, torch.add, torch.mul)},
    **{function.__name__: function for function in (torch.mean, torch.sigmoid, torch.tanh, torch.softmax, torch.chunk)},
    **{function.__name__: function for function in (F.adaptive_avg_pool2d, F.silu, F.gelu, F.hardswish, F.hardsigmoid)},
    **{
        function.__name__: function
        for function in (F.leaky_relu, F.elu, F.pad, F.interpolate, F.max_pool2d, F.softplus, F.dropout)
    },
    **{name: getattr(F, name) for name in ("avg_pool2d", "log_softmax")},
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f".{name}": Method(name) for name in _METHODS},
}
# Those whose result may share the argument's memory.
VIEWS = {
    *("chunk", "flatten", "getattr", "operator.getitem"),
    *(f".{name}" for name in ("chunk", "contiguous", "expand", "flatten", "permute", "reshape", "split", "squeeze")),
    *(f".{name}" for name in ("transpose", "unsqueeze", "view")),
}
NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
# Modules that are one call of a function, with the attributes that are its keywords.
MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.AvgPool2d: ("avg_pool2d", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", ("output_size",)),
    nn.Flatten: ("flatten", ("start_dim", "end_dim")),
    nn.SiLU: ("silu", ()),
    nn.GELU: ("gelu", ("approximate",)),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ELU: ("elu", ("alpha",)),
}
# Modules that do nothing in eval mode.
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
