"""STR, soft thresholds for the weights (Kusupati et al., 2020): with an exact target, and as published."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from str_triton import SparsityController, Target, count, sparsify
from str_triton.cnn.config import Config


def str_exact(
    config: Config, model: nn.Module, example: Tensor, shares: Mapping[str, float] | None
) -> SparsityController:
    """Give the model's weights thresholds, in place, and return the controller that moves them to the target.

    ``shares`` holds the sparsity of each layer, 0 to 1, if --budget names them.
    """
    if shares is not None:
        target = Target(layers=shares)
    elif config.target_flops is not None:
        target = Target(flops=round(config.target_flops * count(model, example).dense_flops))
    else:
        target = Target(sparsity=config.target_sparsity)
    gradient: str | None = config.gradient
    options: dict[str, Any] = {}
    if gradient == "switched":  # the controller's default
        gradient = "straight_through"
    else:
        options["straight_through_until"] = 1.0
    if config.granularity == "global":
        options["floor"] = 0.0  # one threshold cannot keep a floor in each layer
    sparsify(model, granularity=config.granularity, gradient=gradient)
    distribution = config.distribution or "fixed"  # with --budget none is configured
    return SparsityController(model, target, distribution=distribution, example_input=example, **options)


def str_as_published(config: Config, model: nn.Module) -> None:
    """Give the model's weights thresholds, in place, that weight decay and the gradient move. There is no target."""
    sparsify(
        model,
        g="sigmoid",
        granularity=config.granularity,
        gradient=config.gradient,
        raw_threshold_init=config.raw_threshold_init,
    )
