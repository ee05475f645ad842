"""Layers whose weights pass a soft threshold on their way into the forward: torch's own, plus one parameter.

Source: Kusupati et al., ICML 2020: a layer computes with S_g(weight, raw_threshold) = sign(w) relu(|w| - g(s)).
"""

from typing import Any, Self, TypedDict, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton.files import percent
from str_triton.nn.holder import ThresholdHolder
from str_triton.nn.kinds import weight_refusal
from str_triton.nn.raw_threshold import initial_raw, new_raw_threshold
from str_triton.nn.shards import is_sharded
from str_triton.nn.state import RAW, computed_weight, marked, unmark
from str_triton.ops.soft_threshold import soft_threshold

M = TypeVar("M", bound=nn.Module)


def refusal(module: nn.Module) -> str | None:
    """Return why a layer of torch cannot become a thresholded layer; None if it can."""
    if isinstance(module, STRLayer):
        return weight_refusal(module, "weight")
    layer_class = str_class(module)
    if layer_class is None:
        return f"there is no thresholded layer for {type(module).__name__}"
    base = layer_class.dense_class
    for name in ("forward", "_conv_forward", "weight", "bias"):
        if name in vars(module) or getattr(type(module), name, None) is not getattr(base, name, None):
            return f"{type(module).__name__} has its own {name}, which a thresholded layer would not keep"
    return weight_refusal(module, "weight")


def str_class(module: nn.Module) -> "type[STRLayer] | None":
    """Return the thresholded class for a torch layer; None if there is none."""
    return next((cls for cls in STR_LAYERS if isinstance(module, cls.dense_class)), None)


class InitialThreshold(TypedDict, total=False):
    """The options of `new_raw_threshold` by keyword, without g."""

    granularity: str
    initial_threshold: float | None
    raw_threshold_init: float | None


class STRLayer(ThresholdHolder):
    """The base class of all thresholded layers, which stands in front of the torch layer.

    Takes the torch layer's arguments and, by keyword, those of `new_raw_threshold` and `soft_threshold`. The default
    g is "exp" (the paper's is "sigmoid"): a SparsityController multiplies all thresholds by one factor, and those of
    a sigmoid cannot grow beyond 1.

    Attributes:
        weight: the dense weight, the Parameter that the optimizer trains.
        raw_threshold: s, a Parameter of one element, [out, 1, ...] or weight's shape; float32 (float64 if weight is),
            also after `.half()` and the like.
        g, gradient: the options of `soft_threshold`.
    """

    dense_class: type[nn.Module]
    weight: nn.Parameter
    raw_threshold: nn.Parameter

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
        self._add_threshold(raw_threshold, g, gradient, initial_raw(g, initial_threshold, raw_threshold_init))

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        raw_threshold: nn.Parameter | None = None,
        *,
        g: str = "exp",
        gradient: str = "straight_through",
        **threshold_options: Unpack[InitialThreshold],
    ) -> Self:
        """Return a thresholded layer that adopts the dense layer's very Parameter objects, its buffers, hooks and mode.

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
        initial = None
        if raw_threshold is None:
            raw_threshold = new_raw_threshold(dense.get_parameter("weight"), g=g, **threshold_options)
            initial = initial_raw(
                g, threshold_options.get("initial_threshold"), threshold_options.get("raw_threshold_init")
            )
        elif threshold_options:
            raise ValueError(f"raw_threshold is given, which leaves {', '.join(threshold_options)} without effect")
        layer = with_class(dense, cls)
        layer.dense_class = type(dense)
        layer._add_threshold(raw_threshold, g, gradient, initial)
        return layer

    def _add_threshold(self, raw_threshold: nn.Parameter, g: str, gradient: str, initial: float | None) -> None:
        # Every check of the forward, without its arithmetic.
        soft_threshold(self.weight.to("meta"), raw_threshold.to("meta"), g=g, gradient=gradient)
        self._hold(raw_threshold, g, gradient, initial)

    def to_dense(self) -> nn.Module:
        """Return a new plain torch layer that holds the thresholded weight; this layer stays as it is.

        The bias is the same Parameter object; the weight is a new one, trainable if this layer's is.
        """
        dense = with_class(self, self.dense_class)
        for name in (
            "g",
            "gradient",
            "dense_class",
            "learns_threshold",
            "control",
            "_initial_raw",
            "_shares_threshold",
        ):
            vars(dense).pop(name, None)
        del dense.raw_threshold
        dense.weight = plain_parameter(self.sparse_weight, self.weight)
        return dense

    def reset_parameters(self) -> None:
        """Draw new weights and biases, as the torch layer does, and set the threshold to its first value."""
        super().reset_parameters()  # type: ignore[misc]  # the class behind this one is the torch layer
        self.reset_threshold()

    @property
    def dense_weight(self) -> nn.Parameter:
        """The weight Parameter, before the threshold."""
        return self.weight

    @property
    def sparse_weight(self) -> Tensor:
        """The weight that the forward uses: thresholded, differentiable, of weight's shape and dtype."""
        return self.apply_threshold(self.weight)

    def pruning_offsets(self) -> Tensor:
        """Return for each weight the offset, added to raw_threshold, from which on the weight is pruned; detached.

        -inf for a weight of 0, inf for a weight that no threshold of g reaches.
        """
        return self.offsets_from(self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if "weight" not in self._parameters:
            raise computed_weight(prefix.removesuffix("."))
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}weight"] = marked(destination[f"{prefix}weight"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key, missing_keys = f"{prefix}weight", args[2]
        is_plain = not unmark(state_dict, key, self.weight) and key in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)
        if is_plain and prefix + RAW in missing_keys:
            missing_keys.remove(prefix + RAW)  # A plain model's weights leave the thresholds as they are.

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, g={self.g}, gradient={self.gradient}"
        if self.dense_weight.is_meta or not self.dense_weight.numel() or is_sharded(self.dense_weight):
            return text
        with torch.no_grad():
            low, high = self.threshold.min().item(), self.threshold.max().item()
            nonzeros = int(self.sparse_weight.count_nonzero())
        threshold = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        return f"{text}, threshold={threshold}, sparsity={percent(1 - nonzeros / self.weight.numel())}"


class STRConv1d(STRLayer, nn.Conv1d):
    """nn.Conv1d with a thresholded weight [out, in / groups, k]."""

    dense_class = nn.Conv1d
    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.sparse_weight, self.bias)


class STRConv2d(STRLayer, nn.Conv2d):
    """nn.Conv2d with a thresholded weight [out, in / groups, kh, kw]."""

    dense_class = nn.Conv2d
    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.sparse_weight, self.bias)


class STRConv3d(STRLayer, nn.Conv3d):
    """nn.Conv3d with a thresholded weight [out, in / groups, kd, kh, kw]."""

    dense_class = nn.Conv3d
    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.sparse_weight, self.bias)


class STRLinear(STRLayer, nn.Linear):
    """nn.Linear with a thresholded weight [out, in]."""

    dense_class = nn.Linear
    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.sparse_weight, self.bias)


class STREmbedding(STRLayer, nn.Embedding):
    """nn.Embedding with a thresholded weight [vocabulary, dimension]; sparse=True is refused.

    With max_norm, longer rows of the thresholded weight are scaled for the lookup; weight itself is never rewritten.
    """

    dense_class = nn.Embedding
    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        weight = self.sparse_weight
        if self.max_norm is not None:
            weight = weight.clone()  # F.embedding scales rows in place, and the backward needs them as they were.
        return F.embedding(input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)


STR_LAYERS: tuple[type[STRLayer], ...] = (STRConv1d, STRConv2d, STRConv3d, STRLinear, STREmbedding)


def with_class(module: nn.Module, cls: type[M]) -> M:
    """Return a module of class `cls` with what `module` holds: the same Parameters, buffers, hooks, submodules, mode.

    Its tables of parameters and buffers are its own. The hooks' are shared, so that their handles remove them here too.
    """
    twin = cls.__new__(cls)
    vars(twin).update(vars(module))
    vars(twin).update(_parameters=module._parameters.copy(), _buffers=module._buffers.copy())
    vars(twin).pop("_compiled_call_impl", None)  # It calls `module`.
    return twin


def plain_parameter(weight: Tensor, dense: nn.Parameter) -> nn.Parameter:
    """Return a new Parameter with a thresholded weight, trainable if the dense one is."""
    # -0.0, which pruned negative weights leave, becomes 0.0.
    return nn.Parameter(weight.detach() + 0.0, requires_grad=dense.requires_grad)
