"""The thresholded weights of a model, whichever kind of module applies the threshold."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from str_triton.nn.layers import STRLayer
from str_triton.nn.parametrization import SoftThreshold, ThresholdedModule, soft_thresholds
from str_triton.nn.shards import local, local_raw
from str_triton.nn.state import computed_weight
from str_triton.ops.thresholds import threshold_function


@dataclass(frozen=True)
class ThresholdedWeight:
    """A weight with a soft threshold in front of its use.

    Attributes:
        name: the weight's row in `count`: the module's name, followed by the attribute where that is not "weight".
        module: the module that uses the weight.
        attribute: the module's attribute that holds the weight.
        holder: the module that has `raw_threshold`, `g`, `gradient`, `threshold` and `control`: the thresholded layer
            itself, or the parametrization.
    """

    name: str
    module: STRLayer | ThresholdedModule
    attribute: str
    holder: STRLayer | SoftThreshold

    @property
    def dense(self) -> nn.Parameter:
        """The weight before the threshold, the Parameter that the optimizer trains."""
        if isinstance(self.module, STRLayer):
            return self.module.weight
        return self.module.originals()[self.attribute]

    @property
    def is_computed(self) -> bool:
        """Check whether other code computes the weight too since `sparsify`, such as weight_norm or pruning."""
        if isinstance(self.module, STRLayer):
            return self.attribute not in self.module._parameters
        return len(self.module.parametrizations[self.attribute]) > 1  # type: ignore[arg-type]  # a ParametrizationList

    @property
    def sparse(self) -> Tensor:
        """The weight after the threshold, as the forward uses it; differentiable."""
        return self.holder.sparse_weight if isinstance(self.holder, STRLayer) else getattr(self.module, self.attribute)

    @property
    def raw(self) -> nn.Parameter:
        """The raw threshold."""
        return self.holder.raw_threshold

    @property
    def inverse(self) -> Callable[[Tensor], Tensor]:
        """g^-1: the raw threshold at which a magnitude begins to be pruned."""
        return threshold_function(self.holder.g).inverse

    @property
    def local_dense(self) -> Tensor:
        """This process's rows of `dense`, detached, in the same memory."""
        return local(self.dense)

    @property
    def local_raw(self) -> Tensor:
        """The raw threshold of this process's rows, detached; one element is gathered by all processes together."""
        return local_raw(self.raw, self.dense)

    def pruning_offsets(self) -> Tensor:
        """Return for each weight the offset, added to the raw threshold, from which on the weight is pruned; detached.

        -inf for a weight of 0, inf for a weight that no threshold of g reaches. Only this process's rows of a weight.
        """
        return self.holder.offsets_from(self.local_dense, self.local_raw)


def weight_name(module_name: str, attribute: str) -> str:
    """Return the row name of a weight in `count`: "conv1" for its `weight`, "gru.weight_ih_l0" for any other one."""
    return module_name if attribute == "weight" else f"{module_name}.{attribute}".lstrip(".")


def thresholded_weights(model: nn.Module) -> Iterator[ThresholdedWeight]:
    """Yield every use of a thresholded weight, in the order of `model.named_modules()`.

    Layers that share a weight each yield theirs; the Parameter `dense` is then the same object.
    """
    for name, module in model.named_modules():
        if isinstance(module, STRLayer):
            yield ThresholdedWeight(weight_name(name, "weight"), module, "weight", module)
        if isinstance(module, ThresholdedModule):
            for attribute, holder in soft_thresholds(module).items():
                yield ThresholdedWeight(weight_name(name, attribute), module, attribute, holder)


def require_own_weights(uses: Iterable[ThresholdedWeight]) -> None:
    """Raise ValueError if other code computes a thresholded weight too, such as weight_norm or pruning."""
    for use in uses:
        if use.is_computed:
            raise computed_weight(use.name)


def require_one_threshold(uses: Iterable[ThresholdedWeight], *, equal: bool = False) -> None:
    """Raise ValueError if layers share a weight but not its raw threshold; `equal`: different ones of one value pass.

    This comes from tying weights after `sparsify`. Each layer then prunes the weight in its own way.
    """
    first: dict[int, ThresholdedWeight] = {}
    for use in uses:
        if use.is_computed:  # anew at each look
            continue
        other = first.setdefault(id(use.dense), use)
        if other.raw is use.raw or (equal and _has_threshold_of(other, use)):
            continue
        raise ValueError(
            f"{other.name!r} and {use.name!r} share a weight, but each has a threshold of its own: tie weights before "
            "sparsify, or share the raw thresholds too (one Parameter as raw_threshold of both)"
        )


def _has_threshold_of(a: ThresholdedWeight, b: ThresholdedWeight) -> bool:
    same = a.holder.g == b.holder.g and a.raw.shape == b.raw.shape
    return same and (a.raw.is_meta or torch.equal(local(a.raw), local(b.raw)))
