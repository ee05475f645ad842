"""Every weight matrix of a model, thresholded or not."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from str_triton.nn.holder import ThresholdHolder
from str_triton.nn.kinds import NORMS, is_bias, weight_attributes
from str_triton.nn.parametrization import soft_thresholds
from str_triton.nn.state import RAW
from str_triton.nn.thresholded import weight_name

# The parameters that a weight is computed from by weight_norm and by spectral_norm or torch.nn.utils.prune.
_NORMALIZED = ("_g", "_v", "_orig")


@dataclass(frozen=True)
class Matrix:
    """A weight of two or more dimensions.

    Attributes:
        name: the weight's row in `count`: the module's name, followed by the attribute where that is not "weight".
        module: the first module that has the weight.
        attribute: the module's attribute that holds the weight, or the tensor that is computed from its sources.
        sources: the Parameters that the weight is, or is computed from.
        covered: `sparsify` knows the kind of this weight, or has put a threshold in front of it.
        excluded: the user has left the weight dense, by `exclude`, or by `requires_grad=False`.
    """

    name: str
    module: nn.Module
    attribute: str
    sources: tuple[nn.Parameter, ...]
    covered: bool
    excluded: bool

    @property
    def sources_now(self) -> tuple[nn.Parameter, ...]:
        """The present Parameters: `fully_shard` puts others into the module during a forward."""
        return weights_of(self.module)[self.attribute]

    @property
    def value(self) -> Tensor:
        """The module's attribute: the Parameter, or the tensor that is computed from the sources."""
        return getattr(self.module, self.attribute)


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Yield every Parameter of two or more dimensions once, in the order of `model.named_modules()`.

    A weight that several modules share belongs to the first of them. A weight that is computed from other parameters
    (parametrizations, weight and spectral normalization, pruning) is one matrix. Biases, the parameters of
    normalization layers, raw thresholds and buffers are not among them. A lazy parameter, whose shape is not known
    yet, is.
    """
    seen: set[int] = set()
    for name, module in owners(model):
        known = weight_attributes(module)
        left = getattr(module, "_left_dense", ())
        thresholds = soft_thresholds(module)
        for attribute, sources in weights_of(module).items():
            if any(id(source) in seen for source in sources):
                continue
            seen.update(map(id, sources))
            covered = attribute in known or attribute in thresholds
            yield Matrix(weight_name(name, attribute), module, attribute, sources, covered, attribute in left)


def owners(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that may have weights, without normalization layers and the inside of parametrizations."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, ParametrizationList):
            inside.update(module.modules())
        if module not in inside and not isinstance(module, NORMS):
            yield name, module


def weights_of(module: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """Return the sources of each weight that a module itself has, by attribute."""
    found: dict[str, list[nn.Parameter]] = {}
    for attribute, parameter in module._parameters.items():
        if parameter is None or (isinstance(module, ThresholdHolder) and attribute == RAW):
            continue
        found.setdefault(_computed(module, attribute) or attribute, []).append(parameter)
    for attribute, parametrizations in getattr(module, "parametrizations", {}).items():
        if isinstance(parametrizations, ParametrizationList):
            raws = {id(m.raw_threshold) for m in parametrizations if isinstance(m, ThresholdHolder)}
            found[attribute] = [p for p in parametrizations.parameters() if id(p) not in raws]
    return {
        attribute: tuple(sources)
        for attribute, sources in found.items()
        if not is_bias(module, attribute) and any(nn.parameter.is_lazy(p) or p.dim() > 1 for p in sources)
    }


def _computed(module: nn.Module, attribute: str) -> str | None:
    """Return the attribute that a hook of torch computes from this Parameter and others; None if there is none."""
    names = (attribute.removesuffix(suffix) for suffix in _NORMALIZED if attribute.endswith(suffix))
    return next((name for name in names if name not in module._parameters and hasattr(module, name)), None)
