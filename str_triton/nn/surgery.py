"""Model surgery: `sparsify` puts a threshold in front of every weight, `densify` leaves plain layers behind."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from str_triton.nn.layers import BypassedSTRLinear, STRLayer, STRLinear, refusal, str_class
from str_triton.nn.raw_threshold import new_raw_threshold

Filter = Callable[[str, nn.Module], bool] | str | nn.Module | Iterable[str | nn.Module]

# Modules that read the weights of these children without calling them.
_BYPASSES = [
    (nn.MultiheadAttention, "out_proj"),
    (nn.TransformerEncoderLayer, "linear1"),
    (nn.TransformerEncoderLayer, "linear2"),
]
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
    _BYPASSES.append((nn.LinearCrossEntropyLoss, "linear"))


def sparsify(
    model: nn.Module,
    *,
    granularity: str = "layer",
    g: str = "exp",
    gradient: str = "straight_through",
    initial_threshold: float | None = None,
    raw_threshold_init: float | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
) -> nn.Module:
    """Turn convolution, linear and embedding layers into thresholded ones, in place.

    The layers and their Parameters stay the same objects, so that hooks, references and an optimizer made before still
    hold. Modules that share a weight share one raw threshold. Transposed convolutions and recurrent layers stay dense.

    Code that reads a layer's `.weight` instead of calling the layer gets the dense weight, unless the reader is one of
    torch's own modules (nn.MultiheadAttention and the like). Sparsify before DistributedDataParallel wraps the model.

    Args:
        model: any module.
        granularity: one threshold per "layer", "filter" (dimension 0 of the weight) or "weight", or one "global".
        g, gradient: the options of `soft_threshold`. The default g is "exp" (the paper's is "sigmoid"): a
            SparsityController multiplies all thresholds by one factor, and those of a sigmoid cannot grow beyond 1.
        initial_threshold: in units of the weights, default 1e-4; or raw_threshold_init, the raw value itself.
        include, exclude: which layers, by name patterns ("backbone.*", as in fnmatch), by modules (a layer, or all
            those inside), or by a function of (name, module). Default: all.

    Returns:
        The model; a bare layer as a new module.

    Raises:
        ValueError: nothing to sparsify, a pattern that matches no layer, a model sparsified before, a layer that cannot
            be thresholded, a weight shared with a module that is left out, or unknown options.
    """
    if str_layers(model):
        raise ValueError("the model is sparsified already: densify(model) first to begin anew")
    chosen = _chosen(model, include, exclude)
    _check(model, chosen)
    bypassed = {
        id(getattr(module, child)) for module in model.modules() for cls, child in _BYPASSES if isinstance(module, cls)
    }
    raws: dict[int, nn.Parameter] = {}
    layers: dict[int, nn.Module] = {}
    for module in chosen.values():
        key = 0 if granularity == "global" else id(module.weight)
        if key not in raws:
            raws[key] = new_raw_threshold(
                module.weight,
                granularity=granularity,
                g=g,
                initial_threshold=initial_threshold,
                raw_threshold_init=raw_threshold_init,
            )
        cls = str_class(module)
        if cls is STRLinear and id(module) in bypassed:
            cls = BypassedSTRLinear
        layers[id(module)] = cls.from_dense(module, raws[key], g=g, gradient=gradient)
    return _transform(model, layers)


def densify(model: nn.Module) -> nn.Module:
    """Turn thresholded layers into plain ones that hold the thresholded weights, in place.

    Outputs are the same bit for bit, the state dict has the keys that it had before `sparsify`, and shared weights
    stay shared. The weights are new Parameters, which an optimizer made before does not know. A bare layer is returned
    as a new module, a model without thresholded layers as it is.
    """
    layers: dict[int, nn.Module] = {}
    weights: dict[tuple, nn.Parameter] = {}
    for module in str_layers(model).values():
        dense = module.to_dense()
        shared = (id(module.dense_weight), id(module.raw_threshold), module.g)
        dense.weight = weights.setdefault(shared, dense.weight)
        layers[id(module)] = dense
    return _transform(model, layers)


def str_layers(model: nn.Module) -> dict[str, STRLayer]:
    """The thresholded layers of a model by name, each module once; several may share a weight."""
    return {name: module for name, module in model.named_modules() if isinstance(module, STRLayer)}


def _chosen(model: nn.Module, include: Filter | None, exclude: Filter | None) -> dict[str, nn.Module]:
    """The layers to sparsify, under every name that they have."""
    candidates = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if str_class(module) is not None
    }
    if not candidates:
        raise ValueError(f"nothing to sparsify: {type(model).__name__} has no convolution, linear or embedding layer")
    included = set(candidates) if include is None else _matches(candidates, include)
    excluded = set() if exclude is None else _matches(candidates, exclude)
    chosen = {name: module for name, module in candidates.items() if name in included - excluded}
    if not chosen:
        raise ValueError(f"nothing to sparsify: include and exclude leave none of {len(candidates)} layers")
    return chosen


def _matches(candidates: dict[str, nn.Module], which: Filter) -> set[str]:
    if callable(which) and not isinstance(which, nn.Module):
        return {name for name, module in candidates.items() if which(name, module)}
    matches = set()
    for item in [which] if isinstance(which, str | nn.Module) else which:
        if isinstance(item, nn.Module):
            inside, label = set(item.modules()), type(item).__name__
            names = {name for name, module in candidates.items() if module in inside}
        else:
            label = repr(item)
            names = {name for name in candidates if fnmatchcase(name, item)}
        if not names:
            raise ValueError(f"{label} in include or exclude matches no convolution, linear or embedding layer")
        matches |= names
    return matches


def _check(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    owners = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            owners[id(parameter)].append(name)
    for name, module in chosen.items():
        label = name or type(module).__name__
        if reason := refusal(module):
            raise ValueError(f"{label} cannot be thresholded: {reason}; exclude it")
        for other in owners[id(module.weight)]:
            if other not in chosen:
                raise ValueError(f"{label} shares its weight with {other or 'the model'}: include both or exclude both")


def _transform(model: nn.Module, layers: dict[int, nn.Module]) -> nn.Module:
    """Let every module with an entry in `layers` become what that is, and stay the same object; a bare one is new."""
    for module in list(model.modules()):
        if id(module) in layers and module is not model:
            layer = layers[id(module)]
            module.__class__, module.__dict__ = type(layer), vars(layer)
    return layers.get(id(model), model)
