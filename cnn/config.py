"""The configuration of a training run, and what its methods take."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from str_triton.training.config import TrainConfig

DEFAULT_SPARSITY = 0.9
DEFAULT_TEACHER_SHARE = 0.9

# The methods, and the distributions of zeros over the layers that each one takes; the first is the default.
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
# Options that only some methods take, with the default for each method.
TAKEN_BY: dict[str, dict[str, Any]] = {
    "gradient": {"str-exact": "switched", "str": "masked"},
    "granularity": {"str-exact": "layer", "str": "layer"},
    "raw_threshold_init": {"str": -5.0},
    "mask_interval": {"gmp": 10, "rigl": 100},
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """The configuration of a run. Every field is an option of the command line; recipes set the defaults."""

    groups: ClassVar[Mapping[str, str]] = {
        "data": "data data_dir image_size skip_corrupt",
        "network": "model pretrained new_classifier teacher teacher_share",
        "method and target": "method target_sparsity target_flops budget distribution gradient granularity "
        "mask_interval raw_threshold_init",
        "training": "lr_schedule momentum",
        "machine": "compile channels_last",
    }

    data: str = "digits"
    """Data set: digits, cifar10, mnist, fashion-mnist, kmnist, emnist[:SPLIT], imagefolder:DIR, hub:NAME, or hub:DIR
    for a local copy of a data set of the hub."""
    data_dir: str | None = None
    """Directory of the published files: the binary version of cifar10, or the IDX files of mnist, fashion-mnist, kmnist
    and emnist, gzipped or not."""
    skip_corrupt: bool = False
    """Skip images that cannot be decoded, and count them: in training the next image takes the place, in testing there
    is one image less. Without this option such an image ends the run with its name."""
    image_size: int | None = None
    """Height and width that the images of a folder or of the hub are scaled to; 224, or the size of small images."""
    model: str = "resnet-digits"
    """Network: resnet-digits (8x8 images), resnet-small (about 28x28), resnet20 or resnet-medium (about 32x32),
    resnet18, resnet34, resnet50, resnet101, mobilenetv1[:WIDTH], tf_mobilenetv1[:WIDTH], which computes as
    TensorFlow's weights need, or timm:NAME."""

    method: str = "str-exact"
    """str-exact: soft thresholds that meet a target exactly; str: soft thresholds as in the paper, without a target;
    gmp: gradual magnitude pruning; dnw: uses the largest weights and trains all; rigl: sparse from the start, moves
    connections; keep-zeros: fine-tunes a pruned --pretrained network, whose zeros stay zero; dense: no pruning."""
    target_sparsity: float | None = None
    """Share of the weights that are zero at the end, 0 to 1; 0.9 if no target is given."""
    target_flops: float | None = None
    """Multiply-adds at the end as a share of the dense network's, 0 to 1; in place of --target-sparsity (str-exact)."""
    budget: str | None = None
    """The sparsity of every layer, in place of a target: the folder of a finished run, its budget.json or budget.csv, a
    JSON object or a CSV file of layers and sparsities in %, or the recipe of a published point."""
    gradient: Literal["masked", "straight_through", "switched"] | None = None
    """Training of pruned weights: by weight decay only (masked, the default of str), also by the gradient of their
    sparse values (straight_through), or by that gradient in the first half of training (switched, only for str-exact
    and its default)."""
    granularity: Literal["layer", "filter", "weight", "global"] | None = None
    """Weights that share a threshold of str-exact and str. layer (the default): those of a layer; filter: those of a
    filter; weight: none, each weight has its own; global: all weights of the network."""
    distribution: Literal["fixed", "flop-aware", "learned", "uniform", "erk", "global"] | None = None
    """Distribution of the zeros over the layers. str-exact: equal thresholds (fixed, the default), larger thresholds
    where a weight costs more FLOPs (flop-aware), or thresholds that the optimizer trains (learned). gmp, dnw and rigl:
    the same sparsity in each layer (uniform), or by the sum of a layer's dimensions (erk, the default of rigl). Only
    gmp: the smallest weights of all layers together (global)."""
    mask_interval: int | None = None
    """Steps between prunings of gmp (default 10), or between updates of rigl's connections (default 100)."""
    raw_threshold_init: float | None = None
    """Initial raw threshold of --method str (default -5); the threshold is its sigmoid."""

    lr_schedule: Literal["cosine", "epoch-cosine"] = "cosine"
    """cosine changes the learning rate at every step, epoch-cosine once per epoch, as in the paper."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of the weights; with --method str also of the raw thresholds."""
    label_smoothing: float = 0.1
    """Label smoothing: the share of the target probability that is spread over all classes."""

    pretrained: str | None = None
    """Start from a trained network: a state dict (.pth, .pt, .safetensors) with the names of torchvision or of the
    chosen model, the folder of a run, or a checkpoint of the paper's original code."""
    new_classifier: bool = False
    """Take all weights of --pretrained except the classifier's, for data with other classes."""
    teacher: str | None = None
    """Also learn the scores of a trained network (knowledge distillation): the folder of a run, or a file with a
    network. The network must have the data's classes, in the same order."""
    teacher_share: float | None = None
    """The share of the loss that --teacher has, 0.9 if it is not given; the labels have the rest."""
    compile: bool = False
    """Train with torch.compile; evaluation runs without it."""
    channels_last: bool = False
    """Use the memory format channels_last for images and weights, which is faster for convolutions."""


def without_address(data: str) -> str:
    """Return --data without the folder or the name on the hub: the kind, and for the hub the configuration."""
    return re.sub("^(imagefolder:).*|^(hub:)[^:]*", r"\1\2", data)


RESUME_MAY_CHANGE = frozenset({"data_dir", "skip_corrupt", "compile", "channels_last"})
RESUME_MAY_MOVE: dict[str, Callable[[Any], object]] = {"data": without_address, "teacher": bool}
