"""The base class of every module with a raw threshold."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from str_triton.nn.control import Control
from str_triton.nn.raw_threshold import initial_raw, kept_apply
from str_triton.nn.shards import full, is_sharded
from str_triton.nn.state import OPTIONS, RAW, options_tensor, saved_g, saved_options, says_shared
from str_triton.ops.soft_threshold import soft_threshold
from str_triton.ops.thresholds import threshold_function


class ThresholdHolder(nn.Module):
    """A base class in front of a module's own class: a raw threshold, its options, and how both are saved.

    Attributes:
        raw_threshold: s, a Parameter; float32 (float64 if the weight is), also after `.half()` and the like. None in a
            module without a threshold.
        g, gradient: the options of `soft_threshold`.
        learns_threshold: the forward gives the raw threshold a gradient. A controller that needs none turns this off
            and leaves `requires_grad` as it is, which DistributedDataParallel reads once, when it wraps the model.
        control: the mark of the controller that sets the threshold.
    """

    g: str
    gradient: str
    raw_threshold: nn.Parameter | None
    learns_threshold: bool = True
    control: Control | None = None
    _initial_raw: float | None = None
    _shares_threshold = False  # An earlier module of the model has the same raw threshold.

    def _hold(self, raw_threshold: nn.Parameter | None, g: str, gradient: str, initial: float | None = None) -> None:
        self.register_parameter(RAW, raw_threshold)
        self.g = g
        self.gradient = gradient
        self._initial_raw = initial

    @property
    def threshold_options(self) -> Tensor:
        """The options as they stand in the state dict, under this name: torch.distributed.checkpoint looks it up."""
        return options_tensor(self.g, self.gradient, self.raw().device, is_shared=self._shares_threshold)

    @threshold_options.setter
    def threshold_options(self, options: Tensor) -> None:
        """Check the g in a state dict's options, which `torch.func.functional_call` assigns."""
        g = saved_g(OPTIONS, options)
        if g != self.g:
            raise ValueError(f"the state was made with g={g!r}, and the module has g={self.g!r}")

    @property
    def threshold(self) -> Tensor:
        """g(raw_threshold), in units of the weights; raw_threshold's shape."""
        return self.threshold_of(self.raw())

    def threshold_of(self, raw_threshold: Tensor) -> Tensor:
        """Return g(raw_threshold), in units of the weights."""
        return threshold_function(self.g).value(raw_threshold)

    def apply_threshold(self, values: Tensor, raw_threshold: Tensor | None = None) -> Tensor:
        """Return S_g(values, raw_threshold), with the module's options.

        `raw_threshold` is the module's, or the part of it that belongs to the values.
        """
        raw = self.raw() if raw_threshold is None else raw_threshold
        if not is_sharded(values):
            raw = full(raw)
        return soft_threshold(values, raw, g=self.g, gradient=self.gradient, learn_threshold=self.learns_threshold)

    @torch.no_grad()
    def scale_threshold(self, factor: float) -> None:
        """Multiply the threshold, in place: raw_threshold becomes g^-1(factor * threshold)."""
        self.raw().copy_(threshold_function(self.g).inverse(factor * self.threshold))

    @torch.no_grad()
    def reset_threshold(self) -> None:
        """Set the raw threshold to its first value, in place."""
        raw = self._parameters.get(RAW)
        if raw is not None:
            raw.fill_(self._first_raw())

    def offsets_from(self, sizes: Tensor, raw_threshold: Tensor | None = None) -> Tensor:
        """Return for each size the offset g^-1(|size|) - raw_threshold: added to raw_threshold, it and more prune it.

        `raw_threshold` is the module's, or the part of it that belongs to the sizes.

        Detached, of the sizes' shape; -inf for a size of 0, inf for one that no threshold of g reaches.
        """
        raw = (self.raw() if raw_threshold is None else raw_threshold).detach()
        magnitude = sizes.detach().abs().to(torch.promote_types(sizes.dtype, raw.dtype))
        return threshold_function(self.g).inverse(magnitude) - raw

    def raw(self) -> nn.Parameter:
        """Return the raw threshold. Raises ValueError in a module without one."""
        if self.raw_threshold is None:
            raise ValueError(f"this {type(self).__name__} has no threshold")
        return self.raw_threshold

    def _first_raw(self) -> float:
        return initial_raw(self.g) if self._initial_raw is None else self._initial_raw

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        raw = self.raw_threshold
        if raw is None:
            return super()._apply(fn, recurse)
        super()._apply(kept_apply(fn, raw, self._first_raw()), recurse)
        self._keep_tie(raw)
        return self

    @torch.no_grad()
    def _keep_tie(self, before: nn.Parameter) -> None:
        """Put `before` back where torch has replaced the Parameter, or one new Parameter for all that shared it.

        torch makes a new Parameter per module when it assigns loaded tensors and when it moves from the meta device.
        That would break ties, and optimizers and controllers would not see the new Parameters.
        """
        now = self.raw()
        if now is before:
            return
        if _kind(before) == _kind(now):
            before.copy_(now)
            self.raw_threshold = before
            return
        same = vars(before).setdefault("_successor", now)
        if _kind(same) == _kind(now):
            self.raw_threshold = same

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        raw = self.raw_threshold
        if raw is not None:
            if self._shares_threshold and not keep_vars:
                # Formats without shared tensors, as safetensors, refuse a second name of a tensor.
                destination[prefix + RAW] = raw.detach().clone()
            destination[prefix + OPTIONS] = self.threshold_options

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        options = state_dict.get(prefix + OPTIONS)
        try:
            g = saved_options(state_dict, prefix) if self.raw_threshold is not None else None
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if g not in (None, self.g):
            error_msgs.append(
                f"{prefix + RAW!r} was saved with g={g!r}, and the model has g={self.g!r}: make it with g={g!r}"
            )
            return
        if options is not None and self._shares_threshold and not says_shared(options):
            error_msgs.append(
                f"{prefix + RAW!r} was saved as a threshold of its own, and the model has one threshold for several "
                "weights: sparsify it with the granularity, and tie the weights, of the model that was saved"
            )
            return
        raw = self.raw_threshold
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if raw is not None:
            self._keep_tie(raw)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.dtype, tensor.shape, type(tensor.data)
