"""Finds out which weight each product of a forward pass uses, and what the product costs.

Convolutions and matrix products are seen as operators, below the modules. So a module is counted like any other if it
bypasses a child's forward, uses a weight twice, or first computes it from parameters (soft threshold, weight
normalization, a cast under autocast, a transpose).
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from str_triton.nn import Matrix
from str_triton.nn.shards import is_sharded

aten = torch.ops.aten
PRODUCTS = {  # Where the two factors stand among the arguments.
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten._grouped_mm), 0),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addbmm, aten.addmv), 1),
}
RECURRENT = ("gru", "lstm", "rnn_relu", "rnn_tanh")
FACTORIES = {  # Operators that take a tensor's shape, dtype and device, not its values.
    *(aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_ones, aten.new_zeros),
    *(aten.empty_like, aten.full_like, aten.ones_like, aten.rand_like, aten.randn_like, aten.zeros_like),
}
AVERAGE_POOLS = {f"{kind}avg_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)}


class Products(TorchDispatchMode):
    """A mode that adds up the multiply-adds of each weight while it is active.

    A tensor computed from parameters and constants alone is a form of the largest covered weight among its sources (of
    the largest one, if none is covered), and so are the matrices that the input chooses from a weight of three or more
    dimensions (experts). A tensor computed with anything else that comes from the example input is an activation. Both
    are recognised by their storage, so views are recognised, too. Parameters that share a storage are distinguished by
    their bytes in it.

    Attributes:
        dense: multiply-adds by the weight's name.
        sparse: the same without multiply-adds whose weight is zero.
        hidden: names of weights, by the operators of other libraries that use them with an activation, and whose FLOPs
            are unknown.
        unthresholded: names of thresholded weights that are multiplied by an activation without their threshold, as
            they are or in a computed form (a sum, a product with a scale).
    """

    def __init__(self, weights: Sequence[Matrix], inputs: Any, thresholded: Set[str] = frozenset()) -> None:
        super().__init__()
        self.dense: dict[str, int] = {}
        self.sparse: dict[str, int] = {}
        self.hidden: dict[str, set[str]] = {}
        self.unthresholded: set[str] = set()
        self._thresholded = thresholded
        self._paused = False
        self._counted: dict[str, tuple[int, int]] = {}
        self._ranks = {weight.name: (weight.covered, sum(p.numel() for p in weight.sources)) for weight in weights}
        self._activations = {_storage(t) for t in tree_leaves(inputs) if _has_storage(t)}
        self._origins: dict[StorageWeakRef, list[tuple[float, float, str]]] = {}
        self._dense_forms: dict[StorageWeakRef, set[str]] = {}
        for weight in weights:
            self.note(weight)

    def note(self, weight: Matrix) -> None:
        """Note where a weight's elements lie in memory now."""
        for parameter in filter(_has_storage, weight.sources_now):
            extent = 1 + sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True))
            begin = _offset(parameter)
            place = (begin, begin + extent * parameter.itemsize, weight.name)
            self._origins.setdefault(_storage(parameter), []).append(place)

    @contextmanager
    def following(
        self, model: nn.Module, weights: Sequence[Matrix], counted: Mapping[str, tuple[int, int]]
    ) -> Iterator[None]:
        """Learn, before each module's forward, where its sharded weights lie: `fully_shard` gathers them there again.

        `counted` are the elements and nonzeros by name: a gathered weight may be rounded to another dtype.
        """
        sharded = [weight for weight in weights if any(map(is_sharded, weight.sources))]
        self._counted = {weight.name: counted[weight.name] for weight in sharded}

        def note_inside(module: nn.Module, _: Any) -> None:
            inside = set(module.modules())
            for weight in sharded:
                if weight.module in inside:
                    self.note(weight)

        handles = [module.register_forward_pre_hook(note_inside) for module in model.modules()] if sharded else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        with self:
            out = func.decompose(*args, **kwargs)  # F.linear and the like arrive whole in inference mode.
        if out is not NotImplemented:
            return out
        if func is aten.embedding_renorm_.default:  # nn.Embedding(max_norm=...) would rewrite its weight.
            return args[0]
        out = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        self._count(func, args, out, inputs)
        self._find_unthresholded(func, inputs, out)
        self._trace([args[0]] if _chooses_matrices(func, args) else inputs, out)
        return out

    def recurrent(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run `torch.gru` or a function like it and count its weights, each once per time step and sequence.

        The kernels of cuDNN and oneDNN compute all layers in one call, which shows no products.
        """
        x = args[0]  # [steps, batch, features], [batch, steps, features], or [sum of lengths, features] if packed
        weights = [argument for argument in args if isinstance(argument, list | tuple)][-1]  # lstm's states come first
        for weight in weights:
            if weight.dim() > 1:
                self._add(weight, math.prod(x.shape[:-1]) * weight.numel())
        self._paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._paused = False
        self._trace(_tensors((args, kwargs)), out)
        return out

    def _count(self, func: Any, args: tuple, out: Any, inputs: list[Tensor]) -> None:
        op = func.overloadpacket
        if op is aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            self._add(weight, (x if transposed else out).numel() // weight.shape[0] * weight.numel())
        elif op is aten._trilinear:  # nn.Bilinear
            self._add(args[1], args[0].shape[0] * args[1].numel())
        elif op in PRODUCTS:
            a, b = args[PRODUCTS[op] : PRODUCTS[op] + 2]
            # x W^T has the weight second. One that stands first must multiply an activation: without that, the
            # product computes a weight, as W v does in spectral normalization.
            weight = a if self._origin(b) is None and self._is_activation(b) else b
            self._add(weight, a.numel() * (b.shape[-1] if b.dim() > 1 else 1))
        elif str(op) == "str_triton.low_rank_rnn":
            self._count_loop(func, args)
        elif func.namespace != "aten" and any(map(self._is_activation, inputs)):
            names = {name for name in map(self._origin, inputs) if name is not None}
            if names:
                self.hidden.setdefault(str(op), set()).update(names)

    def _find_unthresholded(self, func: Any, inputs: list[Tensor], out: Any) -> None:
        """Note the weights multiplied by an activation without their threshold, and tensors computed from them."""
        if str(func.overloadpacket) == "str_triton.soft_threshold" or func.overloadpacket in FACTORIES:
            return
        bypassed = set().union(*map(self._dense_weights, inputs))
        if bypassed and any(map(self._is_activation, inputs)):
            self.unthresholded |= bypassed
        elif bypassed:
            for tensor in _tensors(out):
                self._dense_forms.setdefault(_storage(tensor), set()).update(bypassed)

    def _dense_weights(self, tensor: Tensor) -> set[str]:
        """Return the names of the thresholded weights whose dense values a tensor holds or is computed from."""
        place = self._place(tensor)
        own = {place[2]} & self._thresholded if place and place[1] < math.inf else set()
        return own | self._dense_forms.get(_storage(tensor), set())

    def _count_loop(self, func: Any, args: tuple) -> None:
        """Count this library's loop over time, which uses each element of both factors once per step and sequence."""
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        gates_x, lengths = named["gates_x"], named["lengths"]  # gates_x: [steps, batch, gates]
        steps = math.prod(gates_x.shape[:2]) if lengths is None or lengths.is_meta else int(lengths.sum())
        for factor in (named["w"], named["v"]):
            self._add(factor, steps * factor.numel())

    def _add(self, weight: Tensor, flops: int) -> None:
        name = self._origin(weight)
        if name is None or flops == 0:
            return
        self.dense[name] = self.dense.get(name, 0) + flops
        size, left = self._counted.get(name, (0, 0))
        left = left if size == weight.numel() else nonzeros(weight)
        self.sparse[name] = self.sparse.get(name, 0) + flops * left // weight.numel()

    def _trace(self, inputs: list[Tensor], out: Any) -> None:
        """Note whether the results of an operator are activations or forms of a weight."""
        outputs = [_storage(t) for t in _tensors(out)]
        if any(map(self._is_activation, inputs)):
            for storage in outputs:
                self._origins.pop(storage, None)  # An activation was written into it.
                self._activations.add(storage)
            return
        names = [name for name in map(self._origin, inputs) if name is not None]
        if names:
            name = max(names, key=self._ranks.__getitem__)
            for storage in outputs:
                self._origins.setdefault(storage, [(0, math.inf, name)])

    def _is_activation(self, tensor: Tensor) -> bool:
        return _has_storage(tensor) and _storage(tensor) in self._activations

    def _origin(self, tensor: Tensor) -> str | None:
        place = self._place(tensor)
        return place and place[2]

    def _place(self, tensor: Tensor) -> tuple[float, float, str] | None:
        """Return the first and the last byte of the weight in its storage, and its name; of a form of it (0, inf)."""
        if not _has_storage(tensor):
            return None
        offset = _offset(tensor)
        places = self._origins.get(_storage(tensor), ())
        return next((place for place in places if place[0] <= offset < place[1]), None)


class Functions(TorchFunctionMode):
    """A mode that counts functions which the operators below them do not show.

    As operators a global average pool is a mean, and a recurrent layer is one call. While a function mode is active,
    torch's attention layers also take no fused path whose products are not seen.

    Attributes:
        pooled: input elements of the average pools.
    """

    def __init__(self, products: Products) -> None:
        super().__init__()
        self.pooled = 0
        self._products = products

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", None)
        if name in AVERAGE_POOLS:
            self.pooled += (args[0] if args else kwargs["input"]).numel()
        if name in RECURRENT and func is getattr(torch, name):
            return self._products.recurrent(func, args, kwargs)
        return func(*args, **kwargs)


def nonzeros(weight: Tensor) -> int:
    """Return the number of elements that are not zero; for a tensor on the meta device, of all elements."""
    return weight.numel() if weight.is_meta else int(weight.count_nonzero())


def _chooses_matrices(func: Any, args: tuple) -> bool:
    if func is aten.index.Tensor:
        return args[0].dim() - len(args[1]) > 1
    return func is aten.index_select.default and args[0].dim() > 2


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if _has_storage(t)]


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not is_sharded(value)


def _storage(tensor: Tensor) -> StorageWeakRef:
    # A weak reference keeps the address from being used again and leaves the memory free to go.
    return StorageWeakRef(tensor.untyped_storage())


def _offset(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.itemsize
