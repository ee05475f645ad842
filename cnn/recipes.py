"""The recipes, named defaults of a run's configuration, and the check of options against each other."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from str_triton.arguments import suggestion
from str_triton.cnn.config import DEFAULT_SPARSITY, DEFAULT_TEACHER_SHARE, METHODS, TAKEN_BY, TARGETS, Config
from str_triton.cnn.published import BASELINES, DENSE, DENSE_WEIGHT_DECAY, POINTS, Dense, Point
from str_triton.training.config import check_ranges, require
from str_triton.training.errors import UserError
from str_triton.training.interface import LONGEST

FINETUNING_LR = 0.128  # half of the learning rate from scratch: docs/methods.md


def digits() -> Config:
    """Train a small residual network on the bundled handwritten digits, 8x8 pixels; under a minute on two cores."""
    # A network this small gains little from a second thread, and is much slower if that thread's core is busy.
    return Config(recipe="digits", threads=1)


def fashion_mnist() -> Config:
    """Train 308,000 weights on Fashion-MNIST, 28x28 pixels (give --data-dir); also fits MNIST and similar data."""
    return Config(
        recipe="fashion-mnist",
        data="fashion-mnist",
        model="resnet-small",
        epochs=10,
        batch_size=128,
        warmup_epochs=1.0,
        label_smoothing=0.0,
    )


def cifar10() -> Config:
    """Train ResNet20 on CIFAR-10 or similar photographs, 32x32 pixels (--model resnet-medium: 1.2 million weights)."""
    return Config(
        recipe="cifar10",
        data="hub:uoft-cs/cifar10",
        model="resnet20",
        epochs=30,
        batch_size=128,
        label_smoothing=0.0,
        channels_last=True,
    )


def mobilenetv1_finetune() -> Config:
    """Fine-tune MobileNetV1 on photographs, 128x128 pixels, 90 % sparse exactly; needs --pretrained and --data."""
    return Config(
        recipe="mobilenetv1-finetune",
        data="",
        image_size=128,
        model="tf_mobilenetv1",
        new_classifier=True,
        target_sparsity=DEFAULT_SPARSITY,
        epochs=16,  # docs/results.md: 2.6 points more than 8 at 90 %
        batch_size=32,
        lr=0.02,
        warmup_epochs=0.5,
        weight_decay=1e-4,
        channels_last=True,
    )


def _imagenet(name: str, description: str, **own: Any) -> tuple[str, Callable[[], Config]]:
    """Return a recipe's name and the recipe: the paper's training with the options ``own`` on top."""

    def recipe() -> Config:
        paper = {"epochs": 100, "lr": 0.256, "momentum": 0.875, "warmup_epochs": 5.0, "label_smoothing": 0.1}
        return Config(recipe=name, data="hub:ILSVRC/imagenet-1k", batch_size=256, **{**paper, **own})

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
    "cifar10": cifar10,
    "mobilenetv1-finetune": mobilenetv1_finetune,
    **dict(_published(point) for point in POINTS),
    **dict(_dense(model, dense) for model, dense in DENSE.items()),
    **dict(_exact(percent) for percent in BASELINES),
    **dict(_finetuning(percent) for percent in BASELINES),
}
FINETUNING = frozenset(name for name in RECIPES if name.endswith("-finetune"))  # each needs --pretrained


CIFAR = ("cifar10", "cifar-10", "cifar100", "cifar-100")
IMAGENET = ("imagenet", "imagenet-1k", "imagenet1k", "ilsvrc2012")


def recipe_for(config: Config) -> str:
    """Return the recipe to use if none is named, by the data set's name. Raise `UserError` if that is ambiguous."""
    kind, _, place = config.data.partition(":")
    if kind not in ("imagefolder", "hub"):
        return config.data if config.data in ("digits", "cifar10") else "fashion-mnist"
    name = place.rstrip("/").rpartition("/")[2].lower()
    if name in CIFAR:
        return "cifar10"
    if name in IMAGENET:
        return "resnet50-str-exact-90"
    raise UserError(
        f"--data {config.data}: name a recipe in front of the options: fashion-mnist for grey images of about 28x28 "
        "pixels, cifar10 for photographs of about 32x32, resnet50-str-exact-90 for larger ones, or another of those "
        "that --help lists"
    )


def resolve(config: Config) -> Config:
    """Return ``config`` with defaults filled in for the target, the distribution and the method's other options.

    The command line takes precedence over the recipe: another target replaces the recipe's, and another method drops
    the recipe's options that it does not take. Raises `UserError` for options that contradict each other.
    """
    if config.method not in METHODS:
        raise UserError(f"--method {config.method}: there is no such method{suggestion(config.method, list(METHODS))}")
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
            f"--gradient switched: only --method str-exact takes it; {config.method} takes masked or straight_through"
        )
    if config.new_classifier and config.pretrained is None and config.recipe not in FINETUNING:
        raise UserError("--new-classifier needs a trained network: name one with --pretrained FILE")
    if config.teacher is not None and config.teacher_share is None:
        config = replace(config, teacher_share=DEFAULT_TEACHER_SHARE)
    if config.teacher is None and config.teacher_share is not None:
        raise UserError(f"--teacher-share {config.teacher_share} needs a trained network: name one with --teacher RUN")
    if config.method == "keep-zeros" and config.pretrained is None:
        raise UserError("--method keep-zeros needs a pruned network: name one with --pretrained FILE")
    _check_ranges(config)
    return config


def _resolve_target(config: Config, recipe: Config) -> Config:
    """Return ``config`` with exactly one target, or with none if the method takes none."""
    given = {name: value for name in TARGETS if (value := getattr(config, name)) is not None}
    asked = {name: value for name, value in given.items() if value != getattr(recipe, name)}
    options = [f"--{name.replace('_', '-')}" for name in asked]
    if not METHODS[config.method]:
        if asked:
            others = ", ".join(name for name, distributions in METHODS.items() if distributions)
            value = asked.popitem()[1]
            raise UserError(f"{options[-1]} {value}: --method {config.method} takes no target; {others} do")
        return _without(config, given)
    if len(asked) > 1:
        raise UserError(f"{' and '.join(options)} are given: choose one")
    if asked:
        config = _without(config, given.keys() - asked.keys())
    if not given:
        config = replace(config, target_sparsity=DEFAULT_SPARSITY)
    if config.target_flops is not None and config.method != "str-exact":
        raise UserError(f"--target-flops {config.target_flops}: --method {config.method} takes --target-sparsity")
    if config.budget is not None and config.distribution is not None:
        raise UserError(f"--distribution {config.distribution}: --budget already names each layer's sparsity; drop one")
    if config.budget is not None and config.granularity == "global":
        raise UserError("--granularity global: with --budget each layer needs its own threshold; use layer or filter")
    return config


def _without(config: Config, names: Iterable[str]) -> Config:
    nothing: dict[str, Any] = dict.fromkeys(names)
    return replace(config, **nothing)


def _resolve_options(config: Config, recipe: Config) -> Config:
    """Return ``config`` with defaults for the options that its method takes, and without the others."""
    for name, defaults in TAKEN_BY.items():
        value = getattr(config, name)
        if config.method in defaults:
            value = defaults[config.method] if value is None else value
        elif value not in (None, getattr(recipe, name)):
            option, takers = name.replace("_", "-"), " and ".join(defaults)
            raise UserError(f"--{option} {value}: --method {config.method} does not take it; it is for {takers}")
        else:
            value = None
        config = replace(config, **{name: value})
    return config


def _check_ranges(config: Config) -> None:
    check_ranges(config)
    if config.image_size is not None:
        require(config, "image_size", 1 <= config.image_size <= LONGEST, f"1 to {LONGEST}")
    if config.teacher_share is not None:
        require(config, "teacher_share", 0.0 <= config.teacher_share <= 1.0, "in 0..1")
    require(config, "momentum", 0.0 <= config.momentum < 1.0, "in 0..1, below 1")
    if config.target_sparsity is not None:
        require(config, "target_sparsity", 0.0 <= config.target_sparsity < 1.0, "in 0..1, below 1")
    if config.mask_interval is not None:
        require(config, "mask_interval", config.mask_interval >= 1, "at least 1")
    if config.raw_threshold_init is not None:
        require(config, "raw_threshold_init", math.isfinite(config.raw_threshold_init), "a finite number")
    if config.target_flops is not None:
        require(config, "target_flops", 0.0 < config.target_flops <= 1.0, "in 0..1, above 0")
