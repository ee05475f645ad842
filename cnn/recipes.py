"""The configuration of a training run, and the named recipes that fill it in."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cnn.published import BASELINES, DENSE, DENSE_WEIGHT_DECAY, POINTS, Dense, Point
from str_triton.training.config import TrainConfig, check_ranges, require
from str_triton.training.errors import UserError

DEFAULT_SPARSITY = 0.9
FINETUNING_LR = 0.128  # half of that from scratch: docs/methods.md

# The methods, and how each can spread the zeros over the layers; the first way is its default.
METHODS = {
    "str-exact": ("fixed", "flop-aware", "learned"),
    "str": (),
    "gmp": ("uniform", "erk", "global"),
    "dnw": ("uniform", "erk"),
    "rigl": ("erk", "uniform"),
    "keep-zeros": (),
    "dense": (),
}
TARGETS = ("target_sparsity", "target_flops", "budget")
# Options that only some methods take, with their defaults there.
TAKEN_BY = {
    "gradient": {"str-exact": "switched", "str": "masked"},
    "granularity": {"str-exact": "layer", "str": "layer"},
    "raw_threshold_init": {"str": -5.0},
    "mask_interval": {"gmp": 10, "rigl": 100},
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """What is trained, on what, and how. Every field is an option of the command line; recipes set the defaults."""

    data: str = "digits"
    """Data set: digits, mnist, fashion-mnist, kmnist, emnist[:SPLIT], imagefolder:DIR, hub:NAME, or hub:DIR for a
    local copy of one."""
    data_dir: str | None = None
    """Directory of the IDX files of mnist, fashion-mnist, kmnist and emnist, as published, gzipped or not."""
    skip_corrupt: bool = False
    """Go on where an image cannot be decoded, and count it: in training the next one stands in for it, in testing it is
    left out. Without this the run ends with the file's name."""
    model: str = "resnet-digits"
    """Network: resnet-digits (8x8 images), resnet-small (about 28x28), resnet20 (32x32), resnet18, resnet34, resnet50,
    resnet101, mobilenetv1[:WIDTH] or timm:NAME."""

    method: str = "str-exact"
    """str-exact: soft thresholds that meet a target exactly; str: the paper's way, without a target; gmp: gradual
    magnitude pruning; dnw: the largest weights of a dense network in training; rigl: connections that move, sparse from
    the start; keep-zeros: the zeros of an already pruned --pretrained network stay, the other weights are trained;
    dense: prunes nothing."""
    target_sparsity: float | None = None
    """Share of the weights that are zero at the end, 0 to 1; 0.9 where no target is given."""
    target_flops: float | None = None
    """Multiply-adds at the end as a share of the dense network's, 0 to 1; in place of --target-sparsity (str-exact)."""
    budget: str | None = None
    """The sparsity of every layer, in place of a target: the folder of a finished run, its budget.json or budget.csv, a
    JSON object or a CSV file of layers and sparsities in %, or the recipe of a published point."""
    gradient: Literal["masked", "straight_through", "switched"] | None = None
    """What moves a pruned weight: weight decay alone (masked; default of str), its sparse value's gradient as well
    (straight_through), or, str-exact alone and its default, that gradient in the first half of training (switched)."""
    granularity: Literal["layer", "filter", "weight", "global"] | None = None
    """What shares one threshold of str-exact and str: a layer (the default), a filter, nothing or everything."""
    distribution: Literal["fixed", "flop-aware", "learned", "uniform", "erk", "global"] | None = None
    """How the zeros are spread over the layers. str-exact: equal thresholds (fixed, the default), larger ones where a
    weight costs more FLOPs (flop-aware), or thresholds that the optimizer moves (learned). gmp, dnw and rigl: the same
    share of each layer (uniform), by the sum of its dimensions (erk, the default of rigl), or, gmp alone, wherever the
    smallest weights are (global)."""
    mask_interval: int | None = None
    """Steps between prunings of gmp (default 10) and between updates of rigl's connections (default 100)."""
    raw_threshold_init: float | None = None
    """Where the raw thresholds of --method str start (default -5); the threshold is their sigmoid."""

    lr_schedule: Literal["cosine", "epoch-cosine"] = "cosine"
    """cosine moves the learning rate at every step, epoch-cosine once per epoch, as the paper does."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay; with --method str also that of the raw thresholds."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""

    pretrained: str | None = None
    """Start from a trained network: a state dict (.pth, .pt, .safetensors) with the names of torchvision or of the
    model at hand, the folder of a run, or a checkpoint of the paper's original code."""
    new_classifier: bool = False
    """Take all of --pretrained but its classifier: for data with other classes."""
    compile: bool = False
    """Train through torch.compile; evaluation runs without it."""
    channels_last: bool = False
    """Keep images and weights with the channels innermost in memory, which suits convolutions on GPUs."""


RESUME_MAY_CHANGE = frozenset({"data_dir", "skip_corrupt", "compile", "channels_last"})


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


def _imagenet(name: str, description: str, **own: object) -> tuple[str, Callable[[], Config]]:
    """A recipe's name, and the recipe: the paper's training with ``own`` on top."""

    def recipe() -> Config:
        paper = {"epochs": 100, "lr": 0.256, "momentum": 0.875, "warmup_epochs": 5.0, "label_smoothing": 0.1}
        return Config(recipe=name, data="hub:ILSVRC/imagenet-1k", batch_size=256, **paper | own)

    recipe.__doc__ = description
    return name, recipe


def _published(point: Point) -> tuple[str, Callable[[], Config]]:
    title = DENSE[point.model].title
    return _imagenet(
        point.name,
        f"{title} on ImageNet as published: {point.sparsity:.2f} % sparse, {point.top1:.2f} % top-1.",
        model=point.model,
        method="str",
        lr_schedule="epoch-cosine",
        weight_decay=point.weight_decay,
        raw_threshold_init=point.raw_threshold_init,
    )


def _dense(model: str, dense: Dense) -> tuple[str, Callable[[], Config]]:
    description = f"{dense.title} on ImageNet, dense, as published: {dense.top1:.2f} % top-1."
    options = {"method": "dense", "lr_schedule": "epoch-cosine", "weight_decay": DENSE_WEIGHT_DECAY}
    return _imagenet(f"{model}-dense", description, model=model, **options)


def _exact(percent: int) -> tuple[str, Callable[[], Config]]:
    description = f"ResNet50 on ImageNet, {percent} % sparse exactly."
    return _imagenet(f"resnet50-str-exact-{percent}", description, **_exact_options(percent))


def _finetuning(percent: int) -> tuple[str, Callable[[], Config]]:
    description = f"ResNet50 from dense to {percent} % sparse exactly, in a tenth of the epochs; needs --pretrained."
    schedule = {"epochs": 10, "lr": FINETUNING_LR, "warmup_epochs": 1.0}
    return _imagenet(f"resnet50-str-exact-{percent}-finetune", description, **_exact_options(percent), **schedule)


def _exact_options(percent: int) -> dict[str, object]:
    return {"model": "resnet50", "target_sparsity": percent / 100, "weight_decay": DENSE_WEIGHT_DECAY}


RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    **dict(_published(point) for point in POINTS),
    **dict(_dense(model, dense) for model, dense in DENSE.items()),
    **dict(_exact(percent) for percent in BASELINES),
    **dict(_finetuning(percent) for percent in BASELINES),
}
FINETUNING = frozenset(name for name in RECIPES if name.endswith("-finetune"))  # each needs --pretrained


IMAGENET = ("imagenet", "imagenet-1k", "imagenet1k", "ilsvrc2012")


def recipe_for(config: Config) -> str:
    """The recipe where none is named, from the data's name; `UserError` where that does not tell the images' size."""
    kind, _, place = config.data.partition(":")
    if kind not in ("imagefolder", "hub"):
        return "digits" if config.data == "digits" else "fashion-mnist"
    if place.rstrip("/").rpartition("/")[2].lower() in IMAGENET:
        return "resnet50-str-exact-90"
    raise UserError(
        f"--data {config.data}: name a recipe in front of the options: fashion-mnist for images of about 28x28 pixels, "
        "resnet50-str-exact-90 for photographs, or another of those that --help lists"
    )


def resolve(config: Config) -> Config:
    """``config`` with target, distribution and the method's other options made definite.

    What the recipe itself says of a target, or of options that the chosen method does not take, gives way to the
    command line. Raises `UserError` for what makes no sense.
    """
    if config.method not in METHODS:
        raise UserError(f"--method {config.method}: there is no such method; the methods are {', '.join(METHODS)}")
    recipe = RECIPES[config.recipe]() if config.recipe in RECIPES else Config(recipe=config.recipe)
    config = _resolve_options(_resolve_target(config, recipe), recipe)
    distributions = METHODS[config.method]
    if config.distribution is None and distributions and config.budget is None:
        config = replace(config, distribution=distributions[0])
    if config.distribution is not None and config.distribution not in distributions:
        ways = f"takes {', '.join(distributions)}" if distributions else "has none to choose"
        raise UserError(f"--distribution {config.distribution}: --method {config.method} {ways}")
    if config.distribution not in (None, "fixed") and config.granularity == "global":
        raise UserError(f"--distribution {config.distribution} and --granularity global exclude each other")
    if config.gradient == "switched" and config.method != "str-exact":
        raise UserError(
            f"--gradient switched: it is --method str-exact that switches; {config.method} takes the others"
        )
    if config.new_classifier and config.pretrained is None:
        raise UserError("--new-classifier says what to leave of a trained network: name one with --pretrained FILE")
    if config.method == "keep-zeros" and config.pretrained is None:
        raise UserError("--method keep-zeros starts from a pruned network: name it with --pretrained FILE")
    _check_ranges(config)
    return config


def _resolve_target(config: Config, recipe: Config) -> Config:
    """``config`` with exactly one target, or with none where the method meets none."""
    given = {name: value for name in TARGETS if (value := getattr(config, name)) is not None}
    asked = {name: value for name, value in given.items() if value != getattr(recipe, name)}
    options = [f"--{name.replace('_', '-')}" for name in asked]
    if not METHODS[config.method]:
        if asked:
            others = ", ".join(name for name, distributions in METHODS.items() if distributions)
            value = asked.popitem()[1]
            raise UserError(f"{options[-1]} {value}: --method {config.method} meets no target; {others} do")
        return replace(config, **dict.fromkeys(given))
    if len(asked) > 1:
        raise UserError(f"{' and '.join(options)} are given: choose one")
    if asked:
        config = replace(config, **dict.fromkeys(given.keys() - asked.keys()))
    if not given:
        config = replace(config, target_sparsity=DEFAULT_SPARSITY)
    if config.target_flops is not None and config.method != "str-exact":
        raise UserError(f"--target-flops {config.target_flops}: --method {config.method} takes --target-sparsity")
    if config.budget is not None and config.distribution is not None:
        raise UserError(f"--distribution {config.distribution}: with --budget the file says how the zeros are spread")
    if config.budget is not None and config.granularity == "global":
        raise UserError("--granularity global: with --budget every layer needs a threshold of its own")
    return config


def _resolve_options(config: Config, recipe: Config) -> Config:
    """``config`` with defaults for the options that its method takes, and without the others."""
    for name, defaults in TAKEN_BY.items():
        value = getattr(config, name)
        if config.method in defaults:
            value = defaults[config.method] if value is None else value
        elif value not in (None, getattr(recipe, name)):
            option, takers = name.replace("_", "-"), " and ".join(defaults)
            raise UserError(f"--{option} {value}: --method {config.method} does not take it; {takers} would")
        else:
            value = None
        config = replace(config, **{name: value})
    return config


def _check_ranges(config: Config) -> None:
    check_ranges(config)
    require(config, "momentum", 0.0 <= config.momentum < 1.0, "in 0..1, below 1")
    if config.target_sparsity is not None:
        require(config, "target_sparsity", 0.0 <= config.target_sparsity < 1.0, "in 0..1, below 1")
    if config.mask_interval is not None:
        require(config, "mask_interval", config.mask_interval >= 1, "at least 1")
    if config.raw_threshold_init is not None:
        require(config, "raw_threshold_init", math.isfinite(config.raw_threshold_init), "a finite number")
    if config.target_flops is not None:
        require(config, "target_flops", 0.0 < config.target_flops <= 1.0, "in 0..1, above 0")
