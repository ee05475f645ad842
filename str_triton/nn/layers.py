"""Layers whose weights pass a soft threshold on their way into the forward: torch's own, plus one parameter.

Source: Kusupati et al., ICML 2020: a layer computes with S_g(weight, raw_threshold) = sign(w) relu(|w| - g(s)).
"""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton.nn.control import Control
from str_triton.nn.raw_threshold import keep_float32, new_raw_threshold
from str_triton.ops.soft_threshold import soft_threshold
from str_triton.ops.thresholds import threshold_function


def refusal(module: nn.Module) -> str | None:
    """Why a convolution, linear or embedding layer cannot be thresholded; None if it can."""
    weight = module._parameters.get("weight")
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is no plain Parameter (parametrized, pruned, lazy, or tied by hand)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating-point"
    if getattr(module, "sparse", False):
        return "sparse=True gives sparse gradients, which a threshold cannot use"
    if not isinstance(module, STRLayer):
        base = str_class(module).dense_class
        for name in ("forward", "_conv_forward", "weight", "bias"):
            if name in vars(module) or getattr(type(module), name, None) is not getattr(base, name, None):
                return f"{type(module).__name__} has its own {name}, which a thresholded layer would not keep"
    return None


def str_class(module: nn.Module) -> "type[STRLayer] | None":
    """The thresholded class for a torch layer; None if there is none."""
    return next((cls for cls in STR_LAYERS if isinstance(module, cls.dense_class)), None)


class STRLayer:
    """What all thresholded layers share: a mixin in front of the torch layer.

    Takes the torch layer's arguments and, by keyword, those of `new_raw_threshold` and `soft_threshold`. The default
    g is "exp" (the paper's is "sigmoid"): a SparsityController multiplies all thresholds by one factor, and those of
    a sigmoid cannot grow beyond 1.

    Attributes:
        weight: the dense weight, the Parameter that the optimizer trains.
        raw_threshold: s, a Parameter of one element, [out, 1, ...] or weight's shape; float32 (float64 if weight is),
            also after `.half()` and the like.
        g, gradient: the options of `soft_threshold`.
    """

    dense_class: ClassVar[type[nn.Module]]
    g: str
    gradient: str
    raw_threshold: nn.Parameter
    control: Control | None = None  # Of the SparsityController that sets the threshold.

    def __init__(
        self,
        *args,
        g: str = "exp",
        gradient: str = "straight_through",
        granularity: str = "layer",
        initial_threshold: float | None = None,
        raw_threshold_init: float | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        if reason := refusal(self):
            raise ValueError(f"{type(self).__name__} cannot be thresholded: {reason}")
        raw_threshold = new_raw_threshold(
            self.weight,
            granularity=granularity,
            g=g,
            initial_threshold=initial_threshold,
            raw_threshold_init=raw_threshold_init,
        )
        self._add_threshold(raw_threshold, g, gradient)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        raw_threshold: nn.Parameter | None = None,
        *,
        g: str = "exp",
        gradient: str = "straight_through",
        **threshold_options,
    ) -> Self:
        """A thresholded layer that adopts the dense layer's very Parameter objects, its buffers, hooks and mode.

        Args:
            dense: the torch layer that this class extends; it stays as it is.
            raw_threshold: a Parameter shared with other layers; by default a new one, made with `threshold_options`
                (granularity, initial_threshold, raw_threshold_init).

        Raises:
            TypeError: dense is of another type, or raw_threshold no Parameter.
            ValueError: unknown options, a raw_threshold that does not fit, or a layer that cannot be thresholded.
        """
        if not isinstance(dense, cls.dense_class):
            raise TypeError(f"{cls.__name__}.from_dense needs {cls.dense_class.__name__}, got {type(dense).__name__}")
        if isinstance(dense, STRLayer):
            raise ValueError(f"{type(dense).__name__} is thresholded already")
        if reason := refusal(dense):
            raise ValueError(f"{type(dense).__name__} cannot be thresholded: {reason}")
        if raw_threshold is None:
            raw_threshold = new_raw_threshold(dense.weight, g=g, **threshold_options)
        elif threshold_options:
            raise ValueError(f"raw_threshold is given, which leaves {', '.join(threshold_options)} without effect")
        layer = _with_class(dense, cls)
        layer.dense_class = type(dense)
        layer._add_threshold(raw_threshold, g, gradient)
        return layer

    def _add_threshold(self, raw_threshold: nn.Parameter, g: str, gradient: str) -> None:
        # Every check of the forward, without its arithmetic.
        soft_threshold(self.dense_weight.to("meta"), raw_threshold.to("meta"), g=g, gradient=gradient)
        self.register_parameter("raw_threshold", raw_threshold)
        self.g = g
        self.gradient = gradient

    def to_dense(self) -> nn.Module:
        """A new plain torch layer that holds the thresholded weight; this layer stays as it is.

        The bias is the same Parameter object; the weight is a new one, trainable if this layer's is.
        """
        dense = _with_class(self, self.dense_class)
        for name in ("g", "gradient", "dense_class", "control"):
            vars(dense).pop(name, None)
        del dense.raw_threshold
        weight = self.sparse_weight.detach() + 0.0  # -0.0, which pruned negative weights leave, becomes 0.0
        dense.weight = nn.Parameter(weight, requires_grad=self.dense_weight.requires_grad)
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn, self.raw_threshold), recurse)

    @property
    def dense_weight(self) -> nn.Parameter:
        """The weight Parameter, before the threshold."""
        return self.weight

    @property
    def threshold(self) -> Tensor:
        """g(raw_threshold), in units of the weights; raw_threshold's shape."""
        return threshold_function(self.g).value(self.raw_threshold)

    @property
    def sparse_weight(self) -> Tensor:
        """The weight that the forward uses: thresholded, differentiable, of weight's shape and dtype."""
        return soft_threshold(self.dense_weight, self.raw_threshold, g=self.g, gradient=self.gradient)

    @torch.no_grad()
    def scale_threshold(self, factor: float) -> None:
        """Multiply the threshold, in place: raw_threshold becomes g^-1(factor * threshold)."""
        self.raw_threshold.copy_(threshold_function(self.g).inverse(factor * self.threshold))

    def pruning_offsets(self) -> Tensor:
        """For each weight the offset g^-1(|w|) - raw_threshold: added to raw_threshold, it and more prune the weight.

        Detached, of weight's shape; -inf for a weight of 0, inf for one that no threshold of g reaches.
        """
        raw = self.raw_threshold.detach()
        magnitude = self.dense_weight.detach().abs().to(torch.promote_types(self.dense_weight.dtype, raw.dtype))
        return threshold_function(self.g).inverse(magnitude) - raw

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, g={self.g}, gradient={self.gradient}"
        if self.dense_weight.is_meta or not self.dense_weight.numel():
            return text
        with torch.no_grad():
            low, high = self.threshold.min().item(), self.threshold.max().item()
            sparsity = (self.sparse_weight == 0).double().mean().item()
        threshold = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        return f"{text}, threshold={threshold}, sparsity={100 * sparsity:.2f}%"


class STRConv1d(STRLayer, nn.Conv1d):
    """nn.Conv1d with a thresholded weight [out, in / groups, k]."""

    dense_class = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.sparse_weight, self.bias)


class STRConv2d(STRLayer, nn.Conv2d):
    """nn.Conv2d with a thresholded weight [out, in / groups, kh, kw]."""

    dense_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.sparse_weight, self.bias)


class STRConv3d(STRLayer, nn.Conv3d):
    """nn.Conv3d with a thresholded weight [out, in / groups, kd, kh, kw]."""

    dense_class = nn.Conv3d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.sparse_weight, self.bias)


class STRLinear(STRLayer, nn.Linear):
    """nn.Linear with a thresholded weight [out, in]."""

    dense_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.sparse_weight, self.bias)


class STREmbedding(STRLayer, nn.Embedding):
    """nn.Embedding with a thresholded weight [vocabulary, dimension]; sparse=True is refused.

    With max_norm, longer rows of the thresholded weight are scaled for the lookup; weight itself is never rewritten.
    """

    dense_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        weight = self.sparse_weight
        if self.max_norm is not None:
            weight = weight.clone()  # F.embedding scales rows in place, and the backward needs them as they were.
        return F.embedding(input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)


class BypassedSTRLinear(STRLinear):
    """A thresholded linear layer inside a module that reads `.weight` and never calls the layer.

    nn.MultiheadAttention and the fast path of nn.TransformerEncoderLayer do so; here they read the thresholded weight.
    """

    @property
    def dense_weight(self) -> nn.Parameter:
        return self._parameters["weight"]

    @property
    def weight(self) -> Tensor:
        return self.sparse_weight


STR_LAYERS: tuple[type[STRLayer], ...] = (STRConv1d, STRConv2d, STRConv3d, STRLinear, STREmbedding)


def _with_class(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A module of class `cls` with what `module` holds: the same Parameters and buffers, hooks, submodules and mode.

    Its tables of parameters and buffers are its own. The hooks' are shared, so that their handles remove them here too.
    """
    twin = cls.__new__(cls)
    vars(twin).update(vars(module))
    vars(twin).update(_parameters=module._parameters.copy(), _buffers=module._buffers.copy())
    vars(twin).pop("_compiled_call_impl", None)  # It calls `module`.
    return twin
