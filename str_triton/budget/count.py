"""Counts what a model costs by watching one forward pass.

Which weight a product uses is decided below the modules, where every convolution and matrix product passes with its
operands in hand: a module that bypasses a child's forward, uses a weight twice, or computes it from parameters first
(soft threshold, weight normalization, a cast under autocast, a transpose) is counted like any other.
"""

import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from str_triton.budget.budget import Budget, LayerBudget
from str_triton.nn.layers import STRLayer

aten = torch.ops.aten
COUNTED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Embedding, nn.EmbeddingBag),
)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
PRODUCTS = {  # Where the two factors stand among the arguments.
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv), 0),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addbmm, aten.addmv), 1),
}
AVERAGE_POOLS = {f"{kind}avg_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)}
POOLS = "(average pools)"


def count(model: nn.Module, example_input: Tensor | tuple | Mapping[str, Any]) -> Budget:
    """What `model` costs for `example_input`, by one forward pass in eval mode.

    Parameters are the *weights* of convolution (also transposed), linear and embedding layers, thresholded or not, and
    the input projections of `nn.MultiheadAttention`; never biases and norms. Weights of recurrent layers (`nn.GRU`,
    `nn.LSTM`, their cells) and parameters that belong to no such layer are not counted; where the forward is seen to
    multiply by one, a warning names it. A thresholded layer's weight counts as its thresholded values.

    FLOPs are multiply-adds of these weights, for the batch as given, times their density; one multiply-add is one FLOP
    and padding counts as input. An average pool costs its input elements (`F.avg_pool*`, `F.adaptive_avg_pool*` and
    their modules, together in the row `"(average pools)"`). Embeddings, max pools, norms, activations, biases and
    products of two activations, such as attention scores, cost nothing.

    There is a row per weight, in the order of `model.named_modules()`. A weight that several layers share is one row
    under the first one's name: once for parameters, at each use for FLOPs. A layer that the forward leaves out costs
    no FLOPs. On the meta device there are no values, and every weight counts as dense.

    The mode of every module, buffers, random state (CPU and CUDA), gradients and hooks are left as they are, also when
    the forward raises; hooks of the model run. Models made with `torch.compile` run uncompiled.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dictionary of keywords.

    Raises:
        TypeError: if `example_input` is something else.
        ValueError: if a lazy layer has not seen its first input yet.
    """
    inputs = _arguments(example_input)
    with _undisturbed(model, inputs):
        inputs = tree_map_only(Tensor, torch.clone, inputs)  # An in-place layer may come first.
        weights = _weights(model)
        products, pools = _Products(weights, model, inputs), _AveragePools()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with pools, products:
            functional_call(model, buffers, *inputs)
    unseen = sorted(products.dense.keys() - weights.keys())
    if unseen:
        warnings.warn(
            "count: products with these parameters are left out, since they are not the weight of a convolution, "
            f"linear or embedding layer: {', '.join(unseen[:5])}{' and others' if len(unseen) > 5 else ''}",
            stacklevel=2,
        )
    rows = [
        LayerBudget(name, w.params, w.nonzeros, products.dense.get(name, 0), products.sparse.get(name, 0), w.threshold)
        for name, w in weights.items()
    ]
    if pools.elements:
        rows.append(LayerBudget(POOLS, 0, 0, pools.elements, pools.elements))
    return Budget(rows)


@dataclass(frozen=True)
class _Weight:
    params: int
    nonzeros: int
    threshold: float | None
    sources: list[nn.Parameter]


def _weights(model: nn.Module) -> dict[str, _Weight]:
    weights = {}
    for name, module, attribute in counted_layers(model):
        threshold = None
        if isinstance(module, STRLayer):
            weight = module.sparse_weight
            threshold = None if weight.is_meta else float(module.threshold.mean())
        else:
            weight = getattr(module, attribute)
        weights[name] = _Weight(weight.numel(), _nonzeros(weight), threshold, _sources(module, attribute))
    return weights


def counted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The weights that `count` counts: row name, module, and the module's attribute that holds the weight.

    In the order of `model.named_modules()`; of layers that share a weight, the first. Raises ValueError for a lazy
    layer.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, COUNTED):
            names = {"weight": prefix}
        elif isinstance(module, nn.MultiheadAttention):
            present = (key for key in ATTENTION_WEIGHTS if getattr(module, key) is not None)
            names = {key: f"{prefix}.{key}".lstrip(".") for key in present}
        else:
            continue
        for attribute, name in names.items():
            sources = _sources(module, attribute)
            if any(nn.parameter.is_lazy(p) for p in sources):
                raise ValueError(f"layer {name!r} is lazy and has no weight yet: run the model once before counting it")
            if not any(id(p) in seen for p in sources):
                seen.update(map(id, sources))
                yield name, module, attribute


def _sources(module: nn.Module, attribute: str) -> list[nn.Parameter]:
    """The Parameters that a weight is or is computed from."""
    # torch's own names: a parametrized or pruned weight is computed from "parametrizations.weight.original" or
    # "weight_orig", a normalized one from "weight_g" and "weight_v".
    prefixes = (attribute, f"parametrizations.{attribute}.")
    return [p for name, p in module.named_parameters() if name.startswith(prefixes)]


def _nonzeros(weight: Tensor) -> int:
    return weight.numel() if weight.is_meta else int(weight.count_nonzero())


class _Products(TorchDispatchMode):
    """Adds up, while it is active, the multiply-adds that each weight takes part in.

    A tensor computed from parameters and constants alone comes from the first counted weight among its sources; a
    tensor computed with anything that comes from the example input is an activation. Both are known by their storage,
    so that views follow; a storage that many parameters share is told apart by the bytes.
    """

    def __init__(self, weights: dict[str, _Weight], model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.weights = weights
        self.dense: dict[str, int] = {}
        self.sparse: dict[str, int] = {}
        self._activations = {_storage(t) for t in tree_leaves(inputs) if _has_storage(t)}
        self._origins: dict[StorageWeakRef, list[tuple[float, float, str]]] = {}
        names = {id(p): name for name, p in model.named_parameters() if p.dim() > 1}
        names |= {id(p): name for name, weight in weights.items() for p in weight.sources}
        for parameter in filter(_has_storage, model.parameters()):
            if id(parameter) in names:
                extent = 1 + sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True))
                begin = _offset(parameter)
                place = (begin, begin + extent * parameter.itemsize, names[id(parameter)])
                self._origins.setdefault(_storage(parameter), []).append(place)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)  # F.linear and the like arrive whole in inference mode.
        if out is not NotImplemented:
            return out
        if func is aten.embedding_renorm_.default:  # nn.Embedding(max_norm=...) would rewrite its weight.
            return args[0]
        out = func(*args, **kwargs)
        op = func.overloadpacket
        if op is aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            self._add(weight, (x if transposed else out).numel() // weight.shape[0] * weight.numel())
        elif op in PRODUCTS:
            a, b = args[PRODUCTS[op] : PRODUCTS[op] + 2]
            # x W^T has the weight second. One that stands first must multiply an activation: without that, the
            # product computes a weight, as W v does in spectral normalization.
            weight = a if self._origin(b) is None and self._is_activation(b) else b
            self._add(weight, a.numel() * (b.shape[-1] if b.dim() > 1 else 1))
        self._trace([t for t in tree_leaves((args, kwargs)) if _has_storage(t)], tree_leaves(out))
        return out

    def _add(self, weight: Tensor, flops: int) -> None:
        name = self._origin(weight)
        if name is None or flops == 0:
            return
        self.dense[name] = self.dense.get(name, 0) + flops
        self.sparse[name] = self.sparse.get(name, 0) + flops * _nonzeros(weight) // weight.numel()

    def _trace(self, inputs: list[Tensor], outputs: list[Any]) -> None:
        outputs = [_storage(t) for t in outputs if _has_storage(t)]
        if any(map(self._is_activation, inputs)):
            for storage in outputs:
                self._origins.pop(storage, None)  # An activation was written into it.
                self._activations.add(storage)
            return
        names = [name for name in map(self._origin, inputs) if name is not None]
        name = next((name for name in names if name in self.weights), names[0] if names else None)
        if name is not None:
            for storage in outputs:
                self._origins.setdefault(storage, [(0, math.inf, name)])

    def _is_activation(self, tensor: Tensor) -> bool:
        return _has_storage(tensor) and _storage(tensor) in self._activations

    def _origin(self, tensor: Tensor) -> str | None:
        if not _has_storage(tensor):
            return None
        offset = _offset(tensor)
        places = self._origins.get(_storage(tensor), ())
        return next((name for begin, end, name in places if begin <= offset < end), None)


class _AveragePools(TorchFunctionMode):
    """Adds up the input elements of average pools, which a global one hides as a mean from the ops below.

    While a function mode is active, torch's attention layers also take no fused path whose products are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in AVERAGE_POOLS:
            self.elements += (args[0] if args else kwargs["input"]).numel()
        return func(*args, **kwargs)


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _storage(tensor: Tensor) -> StorageWeakRef:
    # A weak reference keeps the address from being used again and leaves the memory free to go.
    return StorageWeakRef(tensor.untyped_storage())


def _offset(tensor: Tensor) -> int:
    return tensor.storage_offset() * tensor.itemsize


def _arguments(example_input: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    kind = type(example_input).__name__
    raise TypeError(f"example_input must be a tensor, a tuple of arguments or a dict of keywords, got {kind}")


@contextmanager
def _undisturbed(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Eval mode without gradients; puts modes and random states back."""
    modes = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(inputs)]
    devices = {t.device.index for t in tensors if isinstance(t, Tensor) and t.is_cuda}
    # Nothing is compiled where dynamo was never imported, and the import takes a second.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    torch.clear_autocast_cache()  # A cast made before would be a weight of unknown origin.
    try:
        for module, _ in modes:
            module.training = False  # Not eval(): a model may override it, to merge weights for example.
        with torch.random.fork_rng(sorted(devices), device_type="cuda"), torch.no_grad(), eager:
            yield
    finally:
        for module, training in modes:
            module.training = training
