"""The fallback for a model that cannot be exported: each layer is compiled by itself, the rest runs unchanged."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import FREE, Convolution, Graph, Input, Layer, Linear
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.graph.signature import Leaf, Signature
from str_triton.deploy.sparse.model import CompiledModel, SparseModel
from str_triton.deploy.sparse.surroundings import plain_torch
from str_triton.nn import LowRankRNN


class ModulewiseModel(CompiledModel):
    """A model with its layers compiled one by one."""

    def __init__(
        self, model: nn.Module, layers: dict[str, SparseModel], left: dict[str, str], notes: Sequence[str]
    ) -> None:
        super().__init__()
        self.model, self.left, self.notes = model, left, list(notes)
        for name, layer in layers.items():
            put(model, name, layer)
        self.names = list(layers)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with plain_torch():
            return self.model(*args, **kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        raise ValueError(
            f"{type(self.model).__name__} could not be exported, and a file cannot hold its forward: "
            "torch.save keeps the network instead"
        )

    def layers(self) -> Iterable[tuple[Layer, Choice]]:
        return (pair for name in self.names for pair in self.model.get_submodule(name).compiled.layers())


def supported(module: nn.Module) -> str | None:
    """Return why a convolution or linear layer is left to torch; None if it is not."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    if type(module) is nn.Linear:
        return None
    if type(module) is not nn.Conv2d:
        return type(module).__name__
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if _padding(module) is None:
        return "padding='same' on one side only"
    return None


def left_to_torch(model: nn.Module) -> dict[str, str]:
    """Return the convolution, linear and recurrent layers that are not `supported`, with the reason."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, LowRankRNN)
    reasons = {name: supported(module) for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: reason for name, reason in reasons.items() if reason}


def layer_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the input of every supported layer that is called with one float32 tensor, by the layer's name."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and supported(module) is None and name:

            def remember(module: nn.Module, args: tuple, name: str = name) -> None:
                if len(args) == 1 and is_usual(args[0]):
                    inputs[name] = args[0].detach().clone()

            handles.append(module.register_forward_pre_hook(remember))
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def is_usual(x: Any) -> bool:
    """Check that a compiled layer can take this input as the plain one would."""
    is_plain = isinstance(x, Tensor) and x.dtype == torch.float32 and x.device.type == "cpu"
    return is_plain and x.layout is torch.strided and not torch.is_autocast_enabled("cpu")


def layer_graph(module: nn.Conv2d | nn.Linear, label: str) -> tuple[Graph, Signature]:
    """Return one layer as a network, which takes inputs of any shape that the layer takes."""
    weight = module.weight.detach().contiguous()
    bias = torch.zeros(weight.shape[0], dtype=torch.float32, device="cpu")
    if module.bias is not None:
        bias = module.bias.detach().clone()
    if isinstance(module, nn.Linear):
        layer: Layer = Linear("y", ["x"], weight, bias, FREE, label)
    else:
        geometry = (module.stride, _padding(module), module.dilation, module.groups)
        layer = Convolution("y", ["x"], weight, bias, FREE, label, *geometry)
    structure, returns = pytree.tree_flatten(((0,), {}))[1], pytree.tree_flatten(0)[1]
    signature = Signature(structure, [Leaf(torch.float32, None)], [], returns, ["input"])
    return Graph([Input("x", []), layer], [Ref("y")]), signature


def _padding(module: nn.Conv2d) -> tuple[int, int] | None:
    if not isinstance(module.padding, str):
        return module.padding
    totals = [
        d * (k - 1) if module.padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)
    ]
    return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


class Replaced(nn.Module):
    """A compiled layer in place of a plain one. It has the plain layer's attributes: a forward may read them."""

    def __init__(self, plain: nn.Module, compiled: nn.Module) -> None:
        super().__init__()
        self.plain, self.compiled = plain, compiled

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x) if is_usual(x) else self.plain(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("plain"), name)


def put(model: nn.Module, name: str, compiled: nn.Module) -> None:
    """Put a compiled layer in the place of the plain one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Replaced(model.get_submodule(name), compiled))
