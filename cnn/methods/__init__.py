"""The methods that make a network sparse. Each one prepares a model and gives the training loop a controller.

`prepare` is the only entry point. The loop calls the controller's `step`, evaluates in its `exact()`, and resumes from
its `state_dict()`. Methods with masks also `attach` to the optimizer.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from str_triton import SparsityController, count
from str_triton.cnn.config import Config
from str_triton.cnn.methods.budget_file import layer_sparsities
from str_triton.cnn.methods.distributions import DISTRIBUTIONS, uniform
from str_triton.cnn.methods.dnw import DNW
from str_triton.cnn.methods.gmp import GMP
from str_triton.cnn.methods.keep_zeros import KeepZeros
from str_triton.cnn.methods.masks import Masked
from str_triton.cnn.methods.rigl import RigL
from str_triton.cnn.methods.soft import str_as_published, str_exact

__all__ = ["MASKED", "Masked", "prepare"]

MASKED: dict[str, type[Masked]] = {"gmp": GMP, "dnw": DNW, "rigl": RigL}
FLOOR = 0.5  # "global" leaves each layer at least this share of its weights under "uniform"; as in SparsityController


def prepare(config: Config, model: nn.Module, example: Tensor) -> SparsityController | Masked | None:
    """Prepare the model for ``config.method``, in place, and return the controller of its target, if there is one.

    The method prunes the weights that `count` lists as covered: those of convolution, linear and embedding layers,
    including the first and the last layer.

    Args:
        config: a resolved configuration.
        model: a plain model with the weights to start from.
        example: an input of the model.

    Raises:
        ValueError: a target that cannot be met, or a --budget that does not fit the model.
        OSError: a --budget that cannot be read.
    """
    if config.method == "dense":
        return None
    if config.method == "str":
        return str_as_published(config, model)
    weights = counted_weights(model, example)
    shares = None if config.budget is None else layer_sparsities(config.budget, weights)
    if config.method == "keep-zeros":
        return KeepZeros(weights)
    if config.method == "str-exact":
        return str_exact(config, model, example, shares)
    return masked(config, weights, shares)


def counted_weights(model: nn.Module, example: Tensor) -> dict[str, nn.Parameter]:
    """Return the weights that `count` lists as covered, with the names and in the order of its table."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [row.name for row in count(model, example).covered_rows]
    # The table lists the projections of nn.MultiheadAttention by parameter name, all other weights by layer name.
    return {name: parameters[name if name in parameters else f"{name}.weight".lstrip(".")] for name in names}


def masked(config: Config, weights: Mapping[str, nn.Parameter], shares: Mapping[str, float] | None) -> Masked:
    """Return the controller of a method with masks, one of `MASKED`, for the weights.

    ``shares`` holds the sparsity of each layer. Without it ``config.distribution`` decides how many weights each keeps.
    """
    shapes = [weight.shape for weight in weights.values()]
    sizes = [weight.numel() for weight in weights.values()]
    total = sum(sizes) - round((config.target_sparsity or 0.0) * sum(sizes))
    options = {} if config.mask_interval is None else {"interval": config.mask_interval}
    if shares is not None:
        keep = [size - round(shares[name] * size) for name, size in zip(weights, sizes, strict=True)]
    elif config.distribution == "global":
        filters = [shape[0] for shape in shapes]
        even = uniform(shapes, total)
        keep = [max(1, min(int(FLOOR * number), width)) for number, width in zip(even, filters, strict=True)]
        options["total"] = total
    else:
        keep = DISTRIBUTIONS[config.distribution](shapes, total)
    return MASKED[config.method](weights, keep, **options)
