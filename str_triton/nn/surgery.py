"""Model surgery: `sparsify` puts a threshold in front of every weight, `densify` makes the modules plain again."""

import warnings
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from str_triton.nn.control import controls, warn_of_unfinished
from str_triton.nn.layers import STRLayer, str_class
from str_triton.nn.parametrization import SoftThreshold, ThresholdedModule, parametrize_weights, unparametrized
from str_triton.nn.raw_threshold import initial_raw, new_raw_threshold, zeros_kept
from str_triton.nn.selection import Candidate, Filter, needs_parametrization, select
from str_triton.nn.shards import gather, reshard
from str_triton.nn.thresholded import require_own_weights, thresholded_weights

# Modules that read the weights of these children without calling them.
_BYPASSES: list[tuple[type[nn.Module], str]] = [
    (nn.MultiheadAttention, "out_proj"),
    (nn.TransformerEncoderLayer, "linear1"),
    (nn.TransformerEncoderLayer, "linear2"),
]
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
    _BYPASSES.append((nn.LinearCrossEntropyLoss, "linear"))

# The options that sparsify(keep_zeros=True) sets itself.
_DEFAULTS = ("layer", "exp", "straight_through", None, None)


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
    parameters: Iterable[str] | None = None,
    keep_zeros: bool = False,
) -> nn.Module:
    """Put a soft threshold in front of the weights of a model, in place.

    The function covers these kinds of layers: convolutions and transposed convolutions, linear, bilinear and embedding
    layers, `nn.EmbeddingBag`, recurrent layers (`nn.GRU`, `nn.LSTM`, `nn.RNN`) and their cells, the input projections
    of `nn.MultiheadAttention`, transformers' `Conv1D`, and subclasses of all these. Other parameters of two or more
    dimensions, such as the 3-D weights of a mixture of experts, are thresholded where `parameters` names them. Biases
    and the parameters of normalization layers are never thresholded. Frozen weights (requires_grad=False) stay dense
    unless `include` or `parameters` names them.

    Convolutions, linear layers and embeddings of torch become `STRConv2d` and the like. A module with a forward of its
    own keeps its forward and gets a parametrization (`torch.nn.utils.parametrize`): its weight is then called
    `parametrizations.NAME.original` in `named_parameters()`. Save such a model by its state dict; pickle refuses it.
    Modules and Parameters stay the same objects, so that hooks, references and an optimizer made before stay valid.
    Modules that share a weight share one raw threshold.

    In the state dict each thresholded weight has the plain model's key and an additional first dimension of size 1, so
    that it cannot be taken for a plain weight. `plain_state_dict` turns a state dict into the plain model's. A
    sparsified model loads both kinds; a plain state dict leaves the thresholds as they are.

    Code that reads a layer's `.weight` instead of calling the layer gets the dense weight, and `count` warns of it.
    There are two exceptions: torch's own modules (nn.MultiheadAttention and the like), and weights that `parameters`
    names.
    Sparsify before DistributedDataParallel wraps the model.

    Args:
        model: any module.
        granularity: one threshold per "layer", "filter" or "weight", or one for all layers ("global"). A filter is
            an index of the weight's dimension 0: an input of a transposed convolution, an expert of a 3-D weight.
        g, gradient: the options of `soft_threshold`. The default g is "exp" (the paper's is "sigmoid"): a
            SparsityController multiplies all thresholds by one factor, and those of a sigmoid cannot grow beyond 1.
        initial_threshold: in units of the weights, default 1e-4. `raw_threshold_init` gives the raw value instead.
        include, exclude: which weights, by name patterns of the module or the parameter (`"backbone.*"`,
            `"gru.weight_ih*"`, as in fnmatch), by modules (a layer, or all those inside), or by a function of (module
            name, module). Default: all. `exclude` also takes the names of parameters that are of no known kind
            ("pos_embed"): budgets then do not report them as forgotten.
        parameters: names or name patterns of further parameters to threshold (`"*.experts.*"`), and of weights that
            code reads from their layer (`"blocks.*.qkv.weight"`): these get a parametrization, which shows every reader
            the thresholded weight.
        keep_zeros: fine-tune an already pruned model: weights that are zero now stay zero, whatever the optimizer and
            its momentum do, and all others train without a threshold. The model begins as the same function. This sets
            the options above itself: g "identity", the "masked" gradient, and one fixed threshold per weight, infinite
            at zeros and 0 elsewhere, in float32. There is no target: a SparsityController refuses such a model. A
            weight that training brings to exactly 0.0 may become nonzero again, but has no gradient at 0.0: momentum
            moves it away, plain SGD does not. (One in 150 changes of sign in bfloat16 ends at 0.0, and none of ten
            million in float32.)

    Returns:
        The model. If `model` is itself a layer that becomes an STR layer: the new layer.

    Raises:
        ValueError: nothing to sparsify, a pattern that matches nothing, a model that is already sparsified, weights
            that cannot be thresholded or are shared with a module that is left out (the message names all of them), or
            unknown options.

    Warns:
        UserWarning: frozen weights are left dense, or keep_zeros finds no zeros.
    """
    reshard(model)
    if any(thresholded_weights(model)):
        raise ValueError("the model is sparsified already: densify(model) first to start over")
    if keep_zeros:
        if (granularity, g, gradient, initial_threshold, raw_threshold_init) != _DEFAULTS:
            raise ValueError("keep_zeros=True sets granularity, g, gradient and the thresholds itself: leave them out")
        granularity, g, gradient, raw_threshold_init = "weight", "identity", "masked", 0.0
    initial = initial_raw(g, initial_threshold, raw_threshold_init)
    selection = select(model, include, exclude, parameters)
    bypassed = {
        id(getattr(module, child)) for module in model.modules() for cls, child in _BYPASSES if isinstance(module, cls)
    }
    raws: dict[int, nn.Parameter] = {}
    layers: dict[int, nn.Module] = {}
    parametrizations: dict[nn.Module, dict[str, SoftThreshold]] = defaultdict(dict)
    for use in _once(selection.chosen):
        weight = use.module.get_parameter(use.attribute)
        key = 0 if granularity == "global" else id(weight)
        is_shared = key in raws
        if not is_shared:
            raws[key] = (
                zeros_kept(weight)
                if keep_zeros
                else new_raw_threshold(weight, granularity=granularity, g=g, raw_threshold_init=initial)
            )
        holder = _holder(use, raws[key], g, gradient, id(use.module) in bypassed)
        if isinstance(holder, SoftThreshold):
            parametrizations[use.module][use.attribute] = holder
        else:
            layers[id(use.module)] = holder
        holder._initial_raw = initial
        if is_shared:
            holder._shares_threshold = True
    if keep_zeros and not any(raw.is_meta or bool(raw.isinf().any()) for raw in raws.values()):
        warnings.warn("keep_zeros finds no zeros: load the pruned weights before sparsify", stacklevel=2)
    for use in selection.left:
        vars(use.module).setdefault("_left_dense", set()).add(use.attribute)
    for module, thresholds in parametrizations.items():
        parametrize_weights(module, thresholds)
    return _transform(model, layers)


def _holder(use: Candidate, raw: nn.Parameter, g: str, gradient: str, is_bypassed: bool) -> STRLayer | SoftThreshold:
    """Return the STR layer that a module becomes, or the parametrization of its weight."""
    layer_class = str_class(use.module)
    if layer_class is None or needs_parametrization(use) or is_bypassed:
        return SoftThreshold(raw, g=g, gradient=gradient)
    return layer_class.from_dense(use.module, raw, g=g, gradient=gradient)


def densify(model: nn.Module) -> nn.Module:
    """Turn thresholded modules into plain ones that hold the thresholded weights, in place.

    Outputs are the same bit for bit, with one exception: torch.matmul chooses its kernel by `requires_grad`, so that
    under torch.no_grad the last bits may differ where a module multiplies with a Parameter by matmul, as
    nn.MultiheadAttention does in training mode. After `model.requires_grad_(False)` they are the same there too.

    Classes and the keys of the state dict are those from before `sparsify`, and shared weights stay shared. The weights
    are new Parameters, which an optimizer made before does not know. -0.0 becomes 0.0. If `model` is itself an STR
    layer, a new layer is returned. A model without thresholds is returned unchanged.

    For a model under `fully_shard` all processes call this function, and each then holds the whole plain model. Where
    memory is short, use `plain_state_dict`, which converts the state dict on one process.

    Raises:
        ValueError: other code computes a weight since `sparsify`, such as weight_norm or pruning, or the model's
            controller is inside `exact()`.
    """
    uses = list(thresholded_weights(model))
    require_own_weights(uses)
    marks = controls(use.holder for use in uses)
    if any(mark.is_held and mark.exact for mark in marks):
        raise ValueError("densify inside exact() would leave nothing to go on with: densify a copy.deepcopy(model)")
    warn_of_unfinished(marks)
    for mark in marks:
        mark.densified = True
    gather(model)
    plain: dict[int, nn.Module] = {}
    weights: dict[tuple, nn.Parameter | None] = {}
    for weight in list(thresholded_weights(model)):
        user, attribute = weight.module, weight.attribute
        if id(user) not in plain:
            plain[id(user)] = user.to_dense() if isinstance(user, STRLayer) else unparametrized(user)
        own = plain[id(user)]._parameters
        shared = (id(weight.dense), id(weight.raw), weight.holder.g)
        own[attribute] = weights.setdefault(shared, own[attribute])
    for module in [*model.modules(), *plain.values()]:
        vars(module).pop("_left_dense", None)
    for module in plain.values():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # Lists the Parameters.
    return _transform(model, plain)


def str_layers(model: nn.Module) -> dict[str, STRLayer]:
    """Return the STR layers of a model by name, each module once; several may share a weight.

    `thresholded_weights` also knows the weights of other modules.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, STRLayer)}


def _once(uses: list[Candidate]) -> list[Candidate]:
    """Return each weight of each module once, by the module's first name."""
    once: dict[tuple[int, str], Candidate] = {}
    for use in uses:
        once.setdefault((id(use.module), use.attribute), use)
    return list(once.values())


def _transform(model: nn.Module, modules: dict[int, nn.Module]) -> nn.Module:
    """Let each module with an entry in `modules` become that one, and stay the same object. A bare layer is new."""
    result = model
    for module in list(model.modules()):
        if id(module) not in modules:
            continue
        new = modules[id(module)]
        if module is model and not isinstance(module, ThresholdedModule):
            result = new
        else:
            module.__class__, module.__dict__ = type(new), vars(new)
    return result
