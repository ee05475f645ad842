"""Handlers of single operations: each returns a node of this package, or None where torch executes the operation."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from str_triton.deploy.sparse.graph.context import Context, bound, channels, dimensions, is_float, pair, same_shape
from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Linear, Node
from str_triton.deploy.sparse.graph.pointwise import Activation, Add, Norm
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool, Mean
from str_triton.deploy.sparse.graph.refs import Ref, references

aten = torch.ops.aten
_ACTIVATIONS = ("hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "leaky_relu")


def _convolution(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    weight, bias = given["weight"], given["bias"]
    if not is_float(node) or given.get("transposed") or not context.is_weight(weight, 4) or not context.is_bias(bias):
        return None
    if dimensions(given["input"]) != 4 or given["input"] in context.known:
        return None
    stride, dilation = pair(given["stride"]), pair(given["dilation"])
    padding = given["padding"]
    kernel = context.known[weight].shape[2:]
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        if any(total % 2 for total in totals):
            return None
        padding = tuple(total // 2 for total in totals)
    geometry = (stride, pair(padding), dilation, given["groups"])
    if not all(isinstance(number, int) for sizes in geometry[:3] for number in sizes):
        return None
    return _layer(context, Convolution, node, given["input"], context.known[weight], bias, weight, *geometry)


def _linear(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    weight, bias = given["weight"], given["bias"]
    if not context.is_weight(weight, 2) or not context.is_bias(bias):
        return None
    return _linear_layer(context, node, given["input"], context.known[weight], bias, weight)


def _product(context: Context, node: fx.Node) -> Node | None:
    """Lower a product with a weight that stands on the right, [in, out], and for addmm a bias."""
    given = bound(node)
    x, weight = given.get("mat1", given.get("self")), given.get("mat2", given.get("other"))
    bias = given["self"] if "mat1" in given else None
    if not context.is_weight(weight, 2) or not context.is_bias(bias):
        return None
    matrix = context.known[weight].t()
    if bias is not None and context.known[bias].shape != matrix.shape[:1]:
        return None
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        return None
    return _linear_layer(context, node, x, matrix, bias, weight)


def _linear_layer(context: Context, node: fx.Node, x: Any, matrix: Tensor, bias: Any, weight: fx.Node) -> Node | None:
    if x in context.known or not is_float(node) or not dimensions(x):
        return None
    return _layer(context, Linear, node, x, matrix, bias, weight)


def _layer(
    context: Context, kind: type, node: fx.Node, x: fx.Node, matrix: Tensor, bias: Any, weight: fx.Node, *rest: Any
) -> Node:
    values = (
        torch.zeros(matrix.shape[0], device="cpu", dtype=torch.float32) if bias is None else context.known[bias].clone()
    )
    ref = context.value(x)
    label = context.label(node, weight)
    return kind(context.name(node), [ref.name], matrix.contiguous(), values, (-math.inf, math.inf), label, *rest)


def _norm(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    several = node.target is not aten.batch_norm.default
    if given.get("training") or not is_float(node) or given["input"] in context.known:
        return None
    if several and any(user.args[1] != 0 for user in node.users):
        return None
    names = ("weight", "bias", "running_mean", "running_var")
    parts = [context.known.get(given[name]) if given[name] is not None else None for name in names]
    if any(part is None and given[name] is not None for part, name in zip(parts, names, strict=True)):
        return None
    weight, bias, mean, variance = parts
    if mean is None or variance is None:
        return None
    scale = (variance.double() + given["eps"]).rsqrt()
    shift = -mean.double() * scale
    if weight is not None:
        scale, shift = scale * weight.double(), shift * weight.double()
    if bias is not None:
        shift = shift + bias.double()
    return Norm(context.name(node), [context.value(given["input"]).name], scale, shift, dimensions(given["input"]))


def _by_number(context: Context, node: fx.Node) -> Node | None:
    """Lower the sum or the product of an image and a number, which may become part of a layer."""
    given = bound(node)
    x, number = given["self"], given["other"]
    count = channels(node)
    usual = type(number) in (int, float) and math.isfinite(number) and given.get("alpha", 1) == 1
    if not usual or not count or x in context.known or not is_float(node) or not is_float(x):
        return None
    name = node.target._schema.name
    if name == "aten::div" and number == 0:
        return None
    by = {"aten::mul": number, "aten::div": 1 / number if number else 0.0}.get(name, 1.0)
    plus = {"aten::add": number, "aten::sub": -number}.get(name, 0.0)
    scale, shift = (torch.full((count,), value, dtype=torch.float64, device="cpu") for value in (by, plus))
    return Norm(context.name(node), [context.value(x).name], scale, shift, 4, node.target, number)


def _norm_by_batch(context: Context, node: fx.Node) -> Node | None:
    """Lower a norm that uses the batch's statistics to aten.batch_norm, which also takes empty batches."""
    if any(user.args[1] != 0 for user in node.users):
        return None
    x, weight, bias, *options = (context.arguments(value) for value in bound(node).values())
    args = (x, weight, bias, None, None, *options, False)
    name = context.name(node)
    return Call(name, references(args), aten.batch_norm.default, args, label=context.label(node))


def _clamp(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    x = given["self"]
    name = node.target._schema.name
    default = {"aten::relu": (0.0, math.inf), "aten::relu6": (0.0, 6.0)}.get(name)
    low, high = default or (given.get("min_val", given.get("min")), given.get("max_val", given.get("max")))
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    numbers = all(isinstance(limit, int | float) and not math.isnan(limit) for limit in (low, high))
    if x in context.known or not numbers or low > high or not is_float(node) or not is_float(x):
        return None
    return Activation(context.name(node), [context.value(x).name], channels(node), (float(low), float(high)))


def _activation(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    x, slope = given["self"], given.get("negative_slope", 0.01)
    if x in context.known or not is_float(node) or not is_float(x) or not isinstance(slope, int | float):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    if name == "gelu" and given["approximate"] == "tanh":
        name = "gelu_tanh"
    values = {"activation": name, "slope": float(slope)}
    return Activation(context.name(node), [context.value(x).name], channels(node), **values)


def _add_tensors(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    parts = given["self"], given["other"]
    if not isinstance(parts[1], fx.Node):
        return _by_number(context, node)
    if given.get("alpha", 1) != 1 or not isinstance(parts[0], fx.Node):
        return None
    values = [part.meta.get("val") for part in (*parts, node)]
    if not all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in values):
        return None
    if not all(same_shape(value, values[2]) for value in values[:2]):
        return None
    return Add(context.name(node), [context.value(part).name for part in parts], channels(node))


def _max_pool(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    x = given["self"]
    if dimensions(x) != 4 or not is_float(node) or x in context.known:
        return None
    sizes = (*_window(given), pair(given["dilation"]))
    if not all(isinstance(number, int) for size in sizes for number in size):
        return None
    return MaxPool(context.name(node), [context.value(x).name], *sizes, given["ceil_mode"])


def _avg_pool(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    x, sizes = given["self"], _window(given)
    usual = dimensions(x) == 4 and is_float(node) and is_float(x) and x not in context.known
    if not usual or given["divisor_override"] or not all(isinstance(number, int) for size in sizes for number in size):
        return None
    return AvgPool(context.name(node), [context.value(x).name], *sizes, given["ceil_mode"], given["count_include_pad"])


def _window(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the kernel, the stride and the padding of a pool."""
    kernel = pair(given["kernel_size"])
    return kernel, pair(given["stride"]) if given["stride"] else kernel, pair(given["padding"])


def _mean(context: Context, node: fx.Node) -> Node | None:
    given = bound(node)
    x = given["self"]
    if dimensions(x) != 4 or not is_float(node) or not is_float(x) or x in context.known:
        return None
    if "output_size" in given:
        wanted, keep = list(given["output_size"]) in ([1, 1], [1]), True
    else:
        dims = given["dim"]
        wanted = dims is not None and given["dtype"] is None and sorted(d % 4 for d in dims) == [2, 3]
        keep = given["keepdim"]
    return Mean(context.name(node), [context.value(x).name], keep) if wanted else None


def _attention(context: Context, node: fx.Node) -> Node | None:
    """Lower attention whose queries share keys and values: these are repeated, so that all have one number of heads."""
    given = bound(node)
    tensors = [given[name] for name in ("query", "key", "value")]
    shapes = [part.meta["val"].shape for part in tensors]
    heads = [shape[-3] if len(shape) > 3 else None for shape in shapes]
    usual = given["enable_gqa"] and all(type(count) is int and count > 0 for count in heads)
    if not usual or any(heads[0] % count or free_unbacked_symbols(shapes) for count in heads):
        return None
    values = [context.value(tensors[0])]
    for tensor, count in zip(tensors[1:], heads[1:], strict=True):
        value = context.value(tensor)
        repeated = (value, heads[0] // count, -3)
        name = f"{context.name(node)}.{len(values)}"
        context.nodes.append(Call(name, references(repeated), aten.repeat_interleave.self_int, repeated))
        values.append(Ref(name))
    options = (context.arguments(given["attn_mask"]), given["dropout_p"], given["is_causal"])
    args, scale = (*values, *options), {"scale": context.arguments(given["scale"])}
    return Call(context.name(node), references((args, scale)), node.target, args, scale, context.label(node))


Handler = Callable[[Context, fx.Node], Node | None]
HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys((aten.conv2d.default, aten.conv2d.padding, aten.convolution.default), _convolution),
    aten.linear.default: _linear,
    **dict.fromkeys((aten.addmm.default, aten.mm.default, aten.matmul.default), _product),
    **dict.fromkeys((aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default), _norm),
    aten._native_batch_norm_legit.no_stats: _norm_by_batch,
    **dict.fromkeys((aten.relu.default, aten.relu6.default, aten.hardtanh.default), _clamp),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), _clamp),
    **{getattr(aten, name).default: _activation for name in _ACTIVATIONS},
    aten.add.Tensor: _add_tensors,
    **dict.fromkeys((aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _by_number),
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    **dict.fromkeys((aten.mean.dim, aten.adaptive_avg_pool2d.default), _mean),
    aten.scaled_dot_product_attention.default: _attention,
}
