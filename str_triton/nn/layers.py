"""Layers whose weights pass a soft threshold on their way into the forward: torch's own, plus one parameter.

Source: Kusupati et al., ICML 2020: a layer computes with S_g(weight, raw_threshold) = sign(w) relu(|w| - g(s)).
"""

import math
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton.ops.soft_threshold import soft_threshold
from str_triton.ops.thresholds import threshold_function

GRANULARITIES = ("layer", "filter", "weight", "global")
DEFAULT_THRESHOLD = 1e-4


def new_raw_threshold(
    weight: Tensor,
    *,
    granularity: str = "layer",
    g: str = "sigmoid",
    initial_threshold: float | None = None,
    raw_threshold_init: float | None = None,
) -> nn.Parameter:
    """A raw threshold for a weight: one element, one per filter (dimension 0), or one per weight.

    Args:
        weight: the dense weight, [out, ...]; gives shape and device.
        granularity: "layer" or "global" (one element), "filter" ([out, 1, ...]), "weight" (weight's shape).
        g: name of the threshold function.
        initial_threshold: the threshold in units of the weights, a value that g takes; default 1e-4.
        raw_threshold_init: the raw value itself (the paper's s_init, such as -3200) instead.

    Returns:
        float32 Parameter (float64 if weight is float64).

    Raises:
        ValueError: unknown names, both initial values given, or a threshold that g never takes.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(map(repr, GRANULARITIES))}, got {granularity!r}")
    functions = threshold_function(g)
    if initial_threshold is not None and raw_threshold_init is not None:
        raise ValueError(
            f"give initial_threshold={initial_threshold} or raw_threshold_init={raw_threshold_init}, not both"
        )
    if raw_threshold_init is None:
        threshold = DEFAULT_THRESHOLD if initial_threshold is None else initial_threshold
        raw_threshold_init = float(functions.inverse(torch.tensor(threshold, dtype=torch.float64)))
        if not math.isfinite(raw_threshold_init) or (raw_threshold_init < 0 and g == "identity"):
            raise ValueError(
                f"initial_threshold={threshold} is not a value of g={g!r}; raw_threshold_init sets s itself"
            )
    shapes = {"filter": (weight.shape[0], *[1] * (weight.dim() - 1)), "weight": tuple(weight.shape)}
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return nn.Parameter(
        torch.full(shapes.get(granularity, (1,)), raw_threshold_init, dtype=dtype, device=weight.device)
    )


def refusal(module: nn.Module) -> str | None:
    """Why a convolution, linear or embedding layer cannot be thresholded; None if it can."""
    base = next(cls.dense_class for cls in STR_LAYERS if isinstance(module, cls.dense_class))
    weight = module._parameters.get("weight")
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is no plain Parameter (parametrized, tied by hand, or lazy)"
    names = ("forward", "_conv_forward") if hasattr(base, "_conv_forward") else ("forward",)
    if any(getattr(type(module), name) is not getattr(base, name) for name in names):
        return f"{type(module).__name__} has a forward of its own, which would not see the threshold"
    if getattr(module, "sparse", False):
        return "sparse=True gives sparse gradients, which a threshold cannot use"
    return None


class STRLayer:
    """What all thresholded layers share: a mixin in front of the torch layer.

    Takes the torch layer's arguments and, by keyword, those of `new_raw_threshold` and `soft_threshold`.

    Attributes:
        weight: the dense weight, the Parameter that the optimizer trains.
        raw_threshold: s, a Parameter of one element, [out, 1, ...] or weight's shape; float32 (float64 if weight is).
        g, gradient: the options of `soft_threshold`.
    """

    dense_class: ClassVar[type[nn.Module]]
    g: str
    gradient: str
    raw_threshold: nn.Parameter
    controlled: bool = False  # A SparsityController sets the thresholds.

    def __init__(
        self,
        *args,
        g: str = "sigmoid",
        gradient: str = "straight_through",
        granularity: str = "layer",
        initial_threshold: float | None = None,
        raw_threshold_init: float | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        raw_threshold = new_raw_threshold(
            self.weight,
            granularity=granularity,
            g=g,
            initial_threshold=initial_threshold,
            raw_threshold_init=raw_threshold_init,
        )
        self._add_threshold(raw_threshold, g, gradient)

    @classmethod
    def from_dense(cls, dense: nn.Module, raw_threshold: nn.Parameter | None = None, *, g: str = "sigmoid",
                   gradient: str = "straight_through", **threshold_options) -> Self:  # fmt: skip
        """A thresholded layer that adopts the dense layer's very Parameter objects, its buffers, hooks and mode.

        Args:
            dense: the torch layer that this class extends; it stays as it is.
            raw_threshold: a Parameter shared with other layers; by default a new one, made with `threshold_options`
                (granularity, initial_threshold, raw_threshold_init).

        Raises:
            TypeError: dense is of another type.
            ValueError: unknown options, or a layer that cannot be thresholded.
        """
        if not isinstance(dense, cls.dense_class):
            raise TypeError(f"{cls.__name__}.from_dense needs {cls.dense_class.__name__}, got {type(dense).__name__}")
        if reason := refusal(dense):
            raise ValueError(f"{type(dense).__name__} cannot be thresholded: {reason}")
        layer = cls.__new__(cls)
        # Copies of the dictionaries, not of what they hold: the same Parameters, in a module of its own.
        state = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(dense).items()}
        layer.__dict__.update(state)
        layer.dense_class = type(dense)
        layer._add_threshold(raw_threshold or new_raw_threshold(dense.weight, g=g, **threshold_options), g, gradient)
        return layer

    def _add_threshold(self, raw_threshold: nn.Parameter, g: str, gradient: str) -> None:
        self.raw_threshold = raw_threshold
        self.g = g
        self.gradient = gradient

    def to_dense(self) -> nn.Module:
        """A new plain torch layer that holds the thresholded weight; this layer stays as it is."""
        dense = self.dense_class.__new__(self.dense_class)
        own = {"g", "gradient", "dense_class"}
        state = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(self).items() if k not in own}
        dense.__dict__.update(state)
        del dense._parameters["raw_threshold"]
        weight = self.sparse_weight.detach()
        dense._parameters["weight"] = nn.Parameter(weight, requires_grad=self.dense_weight.requires_grad)
        return dense

    @property
    def dense_weight(self) -> nn.Parameter:
        """The weight Parameter, before the threshold."""
        return self._parameters["weight"]

    @property
    def threshold(self) -> Tensor:
        """g(raw_threshold), in units of the weights; raw_threshold's shape."""
        return threshold_function(self.g).value(self.raw_threshold)

    @property
    def sparse_weight(self) -> Tensor:
        """The weight that the forward uses: thresholded, differentiable, of weight's shape and dtype."""
        return soft_threshold(self.dense_weight, self.raw_threshold, g=self.g, gradient=self.gradient)

    def pruning_offsets(self) -> Tensor:
        """For each weight the offset g^-1(|w|) - raw_threshold: added to raw_threshold, it and more prune the weight.

        Detached, of weight's shape; -inf for a weight of 0, inf for one that no threshold of g reaches.
        """
        raw = self.raw_threshold.detach()
        magnitude = self.dense_weight.detach().abs().to(torch.promote_types(self.dense_weight.dtype, raw.dtype))
        return threshold_function(self.g).inverse(magnitude) - raw

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, g={self.g}, gradient={self.gradient}"
        if self.dense_weight.is_meta:
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
    """nn.Embedding with a thresholded weight [vocabulary, dimension]; sparse=True is refused."""

    dense_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input, self.sparse_weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq
        )


class BypassedSTRLinear(STRLinear):
    """A thresholded linear layer inside a module that reads `.weight` and never calls the layer.

    nn.MultiheadAttention and the fast path of nn.TransformerEncoderLayer do so; here they read the thresholded weight.
    """

    @property
    def weight(self) -> Tensor:
        return self.sparse_weight


STR_LAYERS: tuple[type[STRLayer], ...] = (STRConv1d, STRConv2d, STRConv3d, STRLinear, STREmbedding)
