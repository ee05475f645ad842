"""The configuration of a training run, and the named recipes that fill it in."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from str_triton.training.config import TrainConfig, check_ranges, require
from str_triton.training.errors import UserError

DEFAULT_SPARSITY = 0.9


GRADIENTS = {"str-exact": "straight_through", "str": "masked", "dense": None}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """What is trained, on what, and how. Every field is an option of the command line; recipes set the defaults."""

    data: str = "digits"
    """Data set: digits, mnist, fashion-mnist, kmnist, emnist[:SPLIT], imagefolder:DIR or hub:NAME."""
    data_dir: str | None = None
    """Directory of the IDX files of mnist, fashion-mnist, kmnist and emnist, as published, gzipped or not."""
    model: str = "resnet-digits"
    """Network: resnet-digits (8x8 images), resnet-small (about 28x28), resnet20 (32x32), resnet18, resnet34, resnet50,
    resnet101, mobilenetv1[:WIDTH] or timm:NAME."""

    method: Literal["str-exact", "str", "dense"] = "str-exact"
    """str-exact meets a target exactly; str is the paper's way, without a target; dense prunes nothing."""
    target_sparsity: float | None = None
    """Share of the weights that are zero at the end, 0 to 1; 0.9 where neither target is given."""
    target_flops: float | None = None
    """Multiply-adds at the end as a share of the dense network's, 0 to 1; in place of --target-sparsity."""
    gradient: Literal["masked", "straight_through"] | None = None
    """What moves a pruned weight: its sparse value's gradient (default of str-exact) or weight decay alone (of str)."""
    granularity: Literal["layer", "filter", "weight", "global"] = "layer"
    """What shares one learned threshold."""
    distribution: Literal["fixed", "flop-aware", "learned"] = "fixed"
    """How str-exact spreads the zeros over the layers: equal thresholds (fixed), larger ones where a weight costs more
    FLOPs (flop-aware), or thresholds that the optimizer moves (learned)."""
    raw_threshold_init: float = -5.0
    """Where the raw thresholds of --method str start; the threshold is their sigmoid."""

    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay; with --method str also that of the raw thresholds."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""


RESUME_MAY_CHANGE = frozenset({"data_dir"})


def digits() -> Config:
    """Handwritten digits, 8x8 pixels, bundled: a small residual net, well under a minute on two cores."""
    # So small a net gains little from a second thread, and waiting for one that is busy elsewhere can cost it dearly.
    return Config(recipe="digits", threads=1)


def fashion_mnist() -> Config:
    """Fashion-MNIST, 28x28 pixels (give --data-dir): a residual net of 308,000 weights. Fits MNIST and its like."""
    return Config(
        recipe="fashion-mnist",
        data="fashion-mnist",
        model="resnet-small",
        epochs=10,
        batch_size=128,
        warmup_epochs=1.0,
        label_smoothing=0.0,
    )


RECIPES: dict[str, Callable[[], Config]] = {"digits": digits, "fashion-mnist": fashion_mnist}


def recipe_for(config: Config) -> str:
    """The recipe where none is named: the one for 28x28 images unless the data are the bundled digits."""
    return "digits" if config.data == "digits" else "fashion-mnist"


def settle(config: Config) -> Config:
    """``config`` with target and gradient made definite; `UserError` for values or combinations that make no sense."""
    given = [name for name in ("target_sparsity", "target_flops") if getattr(config, name) is not None]
    if config.method != "str-exact" and given:
        option = f"--{given[0].replace('_', '-')} {getattr(config, given[0])}"
        raise UserError(f"{option}: --method {config.method} meets no target; only --method str-exact does")
    if config.distribution != "fixed" and (config.method != "str-exact" or config.granularity == "global"):
        raise UserError(f"--distribution {config.distribution} needs --method str-exact and no --granularity global")
    if len(given) == 2:
        raise UserError("--target-sparsity and --target-flops are both given: choose one")
    if config.method == "str-exact" and not given:
        config = replace(config, target_sparsity=DEFAULT_SPARSITY)
    if config.gradient is None:
        config = replace(config, gradient=GRADIENTS[config.method])
    _check_ranges(config)
    return config


def _check_ranges(config: Config) -> None:
    check_ranges(config)
    require(config, "momentum", 0.0 <= config.momentum < 1.0, "in 0..1, below 1")
    if config.target_sparsity is not None:
        require(config, "target_sparsity", 0.0 <= config.target_sparsity < 1.0, "in 0..1, below 1")
    if config.target_flops is not None:
        require(config, "target_flops", 0.0 < config.target_flops <= 1.0, "in 0..1, above 0")
