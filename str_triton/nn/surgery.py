"""Model surgery: `sparsify` puts a threshold in front of every weight, `densify` leaves plain layers behind."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from str_triton.nn.layers import STR_LAYERS, BypassedSTRLinear, STRLayer, STRLinear, new_raw_threshold, refusal

Filter = Callable[[str, nn.Module], bool] | Iterable[str]

# Modules that read the weights of these children without calling them.
_BYPASSES = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


def sparsify(
    model: nn.Module,
    *,
    granularity: str = "layer",
    g: str = "sigmoid",
    gradient: str = "straight_through",
    initial_threshold: float | None = None,
    raw_threshold_init: float | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
) -> nn.Module:
    """Replace convolution, linear and embedding layers by thresholded ones, in place.

    The Parameter objects stay the same, so that an optimizer made before still holds. Modules that share a weight
    share one raw threshold. Transposed convolutions and recurrent layers stay dense.

    Args:
        model: any module. Its layers are replaced in their parents; a bare layer is returned as a new module.
        granularity: one threshold per "layer", "filter" (dimension 0 of the weight) or "weight", or one "global".
        g, gradient: the options of `soft_threshold`.
        initial_threshold: in units of the weights, default 1e-4; or raw_threshold_init, the raw value itself.
        include, exclude: which layers, by name patterns ("backbone.*", as in fnmatch) or a function of (name, module).
            Default: all.

    Returns:
        The model.

    Raises:
        ValueError: nothing to sparsify, a pattern that matches no layer, a model sparsified before, a layer that cannot
            be thresholded, a weight shared with a layer that is left out, or unknown options.
    """
    if any(isinstance(module, STRLayer) for module in model.modules()):
        raise ValueError("the model is sparsified already: densify(model) first to begin anew")
    candidates = {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(module, cls.dense_class) for cls in STR_LAYERS)
    }
    chosen = _chosen(candidates, include, exclude)
    if not chosen:
        raise ValueError(f"nothing to sparsify: {len(candidates)} convolution, linear or embedding layers, none chosen")
    _check(candidates, chosen)
    bypassed = {
        id(getattr(module, child))
        for module in model.modules()
        for owner, children in _BYPASSES.items()
        if isinstance(module, owner)
        for child in children
    }
    raws: dict[int, nn.Parameter] = {}
    layers: dict[int, STRLayer] = {}
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
        cls = next(cls for cls in STR_LAYERS if isinstance(module, cls.dense_class))
        if cls is STRLinear and id(module) in bypassed:
            cls = BypassedSTRLinear
        layers[id(module)] = cls.from_dense(module, raws[key], g=g, gradient=gradient)
    return _replace(model, layers)


def densify(model: nn.Module) -> nn.Module:
    """Replace thresholded layers by plain ones that hold the thresholded weights, in place.

    Outputs are the same bit for bit, the state dict has the keys that it had before `sparsify`, and shared weights
    stay shared. A bare layer is returned as a new module. A model without thresholded layers is returned as it is.
    """
    dense: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, STRLayer):
            layer = module.to_dense()
            layer._parameters["weight"] = weights.setdefault(id(module.dense_weight), layer._parameters["weight"])
            dense[id(module)] = layer
    return _replace(model, dense)


def str_layers(model: nn.Module) -> dict[str, STRLayer]:
    """The thresholded layers of a model by name, each module once; several may share a weight."""
    return {name: module for name, module in model.named_modules() if isinstance(module, STRLayer)}


def _chosen(candidates: dict[str, nn.Module], include: Filter | None, exclude: Filter | None) -> dict[str, nn.Module]:
    chosen = candidates if include is None else {name: candidates[name] for name in _matches(candidates, include)}
    left_out = set() if exclude is None else set(_matches(candidates, exclude))
    return {name: module for name, module in chosen.items() if name not in left_out}


def _matches(candidates: dict[str, nn.Module], which: Filter) -> list[str]:
    if callable(which):
        return [name for name, module in candidates.items() if which(name, module)]
    patterns = [which] if isinstance(which, str) else list(which)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(f"no convolution, linear or embedding layer is named {pattern!r}")
    return [name for name in candidates if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _check(candidates: dict[str, nn.Module], chosen: dict[str, nn.Module]) -> None:
    for name, module in chosen.items():
        if reason := refusal(module):
            raise ValueError(f"{name or type(module).__name__} cannot be thresholded: {reason}; exclude it by name")
    names_by_weight = defaultdict(list)
    for name, module in candidates.items():
        names_by_weight[id(module._parameters.get("weight"))].append(name)
    for name, module in chosen.items():
        left_out = [other for other in names_by_weight[id(module.weight)] if other not in chosen]
        if left_out:
            raise ValueError(f"{name} shares its weight with {left_out[0]}: include both or exclude both")


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in replacements:
                module._modules[name] = replacements[id(child)]
    return replacements.get(id(model), model)
