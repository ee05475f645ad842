"""Thresholds in front of the weights of modules that keep their own forward, by torch.nn.utils.parametrize."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from str_triton.nn.holder import ThresholdHolder
from str_triton.nn.kinds import weight_refusal
from str_triton.nn.layers import plain_parameter, with_class
from str_triton.nn.shards import is_sharded
from str_triton.nn.state import RAW, marked, unmark
from str_triton.ops.soft_threshold import soft_threshold

_RESETS = ("reset_parameters", "_reset_parameters")  # torch's names


class SoftThreshold(ThresholdHolder):
    """The parametrization of one weight: weight -> S_g(weight, raw_threshold).

    Args:
        raw_threshold: s, a Parameter that fits the weight.
        g, gradient: the options of `soft_threshold`.
        initial: the first value of the raw threshold; None: the default of g.
    """

    raw_threshold: nn.Parameter

    def __init__(self, raw_threshold: nn.Parameter, *, g: str, gradient: str, initial: float | None = None) -> None:
        super().__init__()
        meta = raw_threshold.to("meta")
        soft_threshold(meta, meta, g=g, gradient=gradient)  # Every check of the forward, without its arithmetic.
        self._hold(raw_threshold, g, gradient, initial)
        self._computed: dict[bool, Tensor] | None = None  # While the module's forward runs.

    def forward(self, weight: Tensor) -> Tensor:
        """Return the thresholded weight; within one forward of the module, the same tensor at every use."""
        if self._computed is None:
            return self.apply_threshold(weight)
        with_graph = torch.is_grad_enabled()
        if with_graph not in self._computed:
            self._computed[with_graph] = self.apply_threshold(weight)
        return self._computed[with_graph]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the dense weight to hold after `module.weight = weight`."""
        return weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys = args[2]
        if prefix + RAW in missing_keys:
            missing_keys.remove(prefix + RAW)  # `ThresholdedModule` reports a missing raw threshold.

    def extra_repr(self) -> str:
        text = f"g={self.g}, gradient={self.gradient}"
        if self.raw_threshold.is_meta or not self.raw_threshold.numel() or is_sharded(self.raw_threshold):
            return text
        low, high = (float(value) for value in self.threshold.detach().aminmax())
        return f"{text}, threshold={low:.4g}" + ("" if low == high else f" to {high:.4g}")


class ThresholdedModule(nn.Module):
    """A base class in front of a module's own class, for modules with a `SoftThreshold`.

    In the state dict the weights have the names that they have in the plain module.
    """

    dense_class: ClassVar[type[nn.Module]]
    parametrizations: nn.ModuleDict
    _parameter_order: tuple[str, ...]  # of the plain module

    def plain(self, weights: Mapping[str, nn.Parameter]) -> nn.Module:
        """Return a module of the plain class that holds what this module holds, and `weights` by attribute."""
        plain = with_class(self, self.dense_class)
        modules = {name: module for name, module in self._modules.items() if name != "parametrizations"}
        parameters = _ordered({**self._parameters, **weights}, self._parameter_order)
        vars(plain).update(_modules=modules, _parameters=parameters)
        vars(plain).pop("_parameter_order")
        if isinstance(plain, nn.RNNBase):
            plain._init_flat_weights()
        return plain

    def originals(self) -> dict[str, nn.Parameter]:
        """Return the dense weights by attribute."""
        return {name: entries.original for name, entries in self._lists().items()}

    def _lists(self) -> "dict[str, _Parametrizations]":
        """Return the parametrizations of the thresholded weights, by attribute."""
        lists = self.parametrizations.items()
        return {name: entries for name, entries in lists if isinstance(entries, _Parametrizations)}

    @contextmanager
    def _as_plain(self) -> Iterator[None]:
        """Hold the dense weights as the module's own Parameters, where the plain class has them."""
        own = self._parameters
        vars(self)["_parameters"] = held = _ordered({**own, **self.originals()}, self._parameter_order)
        try:
            yield
        finally:
            for name, original in self.originals().items():
                weight = held.pop(name)
                if weight is not original:  # load_state_dict(assign=True)
                    self._lists()[name].original = weight
            vars(self)["_parameters"] = held

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._as_plain():
            super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in soft_thresholds(self):
                destination[prefix + name] = marked(destination[prefix + name])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        missing_keys = args[2]
        thresholded = [name for name, weight in self.originals().items() if unmark(state_dict, prefix + name, weight)]
        with self._as_plain():
            super()._load_from_state_dict(state_dict, prefix, *args)
        raws = (f"{prefix}parametrizations.{name}.0.{RAW}" for name in thresholded)
        missing_keys.extend(key for key in raws if key not in state_dict)


class _ThresholdedRNN(ThresholdedModule, nn.RNNBase):
    """The base class for recurrent layers, which pass the list `_flat_weights` to the kernel.

    RNNBase fills the list once, with Parameters. Here each access makes it from the thresholded weights.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super(nn.RNNBase, self).__setattr__(
            name, value
        )  # RNNBase would write `value` into the list, which the property creates again.

    @property  # type: ignore[override]  # torch's list of Parameters; its kernels take any tensors
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None:
        pass  # RNNBase stores what the getter makes.

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: the thresholded weights are new tensors at each forward."""


class _Parametrizations(parametrize.ParametrizationList):
    """The list of one weight's parametrizations; the module saves and loads the dense weight itself."""

    original: nn.Parameter

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}original"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys = args[2]
        if f"{prefix}original" in missing_keys:
            missing_keys.remove(f"{prefix}original")


def parametrization_refusal(module: nn.Module, attribute: str) -> str | None:
    """Return why a weight cannot be thresholded while its module keeps its own forward; None if it can."""
    if reason := weight_refusal(module, attribute):
        return reason
    if parametrize.is_parametrized(module):
        return "it is parametrized already"
    if hasattr(type(module), attribute):
        return f"{type(module).__name__} has its own {attribute}"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return f"max_norm makes {type(module).__name__} rewrite its weight"
    return None


def parametrize_weights(module: nn.Module, thresholds: Mapping[str, SoftThreshold]) -> None:
    """Put thresholds in front of a module's weights, in place. Their Parameters stay the same objects."""
    order = tuple(module._parameters)
    vars(module).pop("_flat_weights", None)
    module.__class__ = _thresholded_class(type(module))  # type: ignore[arg-type]  # a class is hashable
    vars(module)["_parameter_order"] = order
    for attribute, threshold in thresholds.items():
        parametrize.register_parametrization(module, attribute, threshold, unsafe=True)
        module.get_submodule(f"parametrizations.{attribute}").__class__ = _Parametrizations
    module.get_submodule("parametrizations").train(module.training)


def soft_thresholds(module: nn.Module) -> dict[str, SoftThreshold]:
    """Return the thresholds in front of a module's weights, by attribute."""
    if not isinstance(module, ThresholdedModule):
        return {}
    lists = module._lists().items()
    return {attribute: entries[0] for attribute, entries in lists if isinstance(entries[0], SoftThreshold)}


def unparametrized(module: ThresholdedModule) -> nn.Module:
    """Return a plain module with new Parameters of the thresholded weights; the module stays as it is."""
    lists = module._lists()
    if len(lists) < len(module.parametrizations) or any(len(entries) > 1 for entries in lists.values()):
        raise ValueError(f"{type(module).__name__} has further parametrizations: remove them first")
    originals = module.originals()
    return module.plain({name: plain_parameter(getattr(module, name), originals[name]) for name in originals})


def _ordered(parameters: dict[str, Any], order: tuple[str, ...]) -> dict[str, Any]:
    return {name: parameters[name] for name in order if name in parameters} | parameters


@functools.cache
def _thresholded_class(plain: type[nn.Module]) -> type[ThresholdedModule]:
    """Return the class of modules of class `plain` with a threshold in front of some weights."""
    base = _ThresholdedRNN if issubclass(plain, nn.RNNBase) else ThresholdedModule

    @functools.wraps(plain.forward)
    def forward(self: ThresholdedModule, *args: Any, **kwargs: Any) -> Any:
        thresholds = soft_thresholds(self).values()
        if torch.compiler.is_compiling() or any(threshold._computed is not None for threshold in thresholds):
            return plain.forward(self, *args, **kwargs)
        # Some modules read a weight many times in one forward.
        try:
            for threshold in thresholds:
                threshold._computed = {}
            return plain.forward(self, *args, **kwargs)
        finally:
            for threshold in thresholds:
                threshold._computed = None

    def reset(name: str, self: ThresholdedModule) -> None:
        getattr(self.plain(self.originals()), name)()  # In place, so that the Parameters here have the values.
        for threshold in soft_thresholds(self).values():
            threshold.reset_threshold()

    resets = {name: functools.partialmethod(functools.partial(reset, name)) for name in _RESETS if hasattr(plain, name)}
    body = {
        "dense_class": plain,
        "forward": forward,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
        **resets,
    }
    return type(plain.__name__, (base, plain), body)
