"""The options that every training program has."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from str_triton.training.errors import UserError, one_line
from str_triton.training.memory import keep_freed_memory
from str_triton.training.options import hidden


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of every run. Programs add their own; every field is an option of their command line."""

    groups: ClassVar[Mapping[str, str]] = {
        "run": "seed run_dir resume describe checkpoint_steps log_with",
        "machine": "device amp threads workers",
    }

    recipe: str = hidden()
    seed: int = 0
    """Seed of the weights, the order of the examples and their augmentation."""
    run_dir: str | None = None
    """Directory for everything that the run writes; a new one below runs/ by default."""
    resume: bool = False
    """Resume the run in --run-dir with the options that it was started with."""
    describe: bool = False
    """Print the whole configuration and the published results of the recipe, without training."""
    checkpoint_steps: int = 500
    """Steps between checkpoints within an epoch; every epoch also ends with one."""
    log_with: Literal["tensorboard", "wandb", "mlflow"] = "tensorboard"
    """Tracker for the metrics. TensorBoard events are always written; wandb and mlflow get the same numbers."""
    workers: int = 0
    """Processes that read examples; with 0 the training process reads them. The results are the same."""
    threads: int = 0
    """CPU threads of the training process; 0 leaves the choice to PyTorch. The last bits of results depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU if there is one."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """The options of a run that trains in epochs."""

    groups: ClassVar[Mapping[str, str]] = {
        "training": "epochs batch_size accumulate lr warmup_epochs weight_decay label_smoothing"
    }

    epochs: int = 30
    """Passes over the training examples."""
    batch_size: int = 64
    """Examples in a step, of all processes together."""
    accumulate: int = 1
    """Gradient accumulation, for less memory: each process computes its examples of a step in so many parts, one after
    the other. Batch norm and dropout see each part alone; without them results differ only by rounding."""
    lr: float = 0.1
    """Peak learning rate. The schedule is a linear warmup, then half a cosine to zero."""
    warmup_epochs: float = 2.0
    """Epochs of linear warmup."""
    weight_decay: float = 0.0
    """Weight decay."""
    label_smoothing: float = 0.0
    """Label smoothing: the share of the target probability that is spread over all classes."""


ConfigT = TypeVar("ConfigT", bound=RunConfig)

RESUME_MAY_CHANGE = frozenset(
    {"run_dir", "resume", "describe", "checkpoint_steps", "log_with", "workers", "device", "accumulate"}
)


def make_accelerator(config: RunConfig) -> Accelerator:
    """Make the Accelerator, which holds device, precision and processes, and make cuDNN deterministic.

    On the CPU the process keeps the memory that it frees (see `keep_freed_memory`).

    Raises `UserError` if an option needs a GPU and there is none, or if the processes cannot reach each other.
    """
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise UserError("--device cuda: PyTorch finds no GPU here")
    cpu = config.device == "cpu" or not gpu
    if config.amp == "fp16" and cpu:
        raise UserError("--amp fp16 needs a GPU; --amp bf16 also works on the CPU")
    if config.threads:
        torch.set_num_threads(config.threads)
    if cpu:
        keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    # The loop accumulates gradients itself. A setting of `accelerate config` would scale the loss a second time.
    whole_steps = GradientAccumulationPlugin(num_steps=1)
    try:
        return Accelerator(cpu=cpu, mixed_precision=config.amp, gradient_accumulation_plugin=whole_steps)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        variable = "GLOO_SOCKET_IFNAME" if cpu else "NCCL_SOCKET_IFNAME"
        raise UserError(
            f"the processes cannot reach each other: {one_line(error)}; {variable} names the network interface to use, "
            "such as eth0"
        ) from error


def from_plain(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make a configuration from the plain values of a file. Raise ``ValueError`` for a wrong name or type."""
    if not isinstance(values, dict):
        raise ValueError("it is not an object with an entry for each option")
    types = get_type_hints(kind)
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"it has the unknown option {name}: another version may have written it")
        if not _fits(value, types[name]):
            raise ValueError(f"{name} is {value!r}, and must be {_words(types[name])}")
    return kind(**values)


def _fits(value: object, type_: Any) -> bool:
    """Return whether a plain value fits a field's type: a class, a Literal or a union of them."""
    if get_origin(type_) is Literal:
        return isinstance(value, str) and value in get_args(type_)
    if get_args(type_):
        return any(_fits(value, part) for part in get_args(type_))
    return type(value) is type_ or (type_ is float and type(value) is int)


def _words(type_: Any) -> str:
    """Return a field's type in words."""
    if get_origin(type_) is Literal:
        return " or ".join(map(repr, get_args(type_)))
    if get_args(type_):
        return " or ".join(map(_words, get_args(type_)))
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}[type_]


def require(config: RunConfig, name: str, holds: bool, range_: str) -> None:
    """Raise `UserError`, which names the option and its value, unless ``holds`` is true."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: it must be {range_}")


def check_parts(config: TrainConfig, processes: int) -> None:
    """Raise `UserError` unless the batch size is divisible by the number of processes times --accumulate."""
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be divided over {processes} processes with --accumulate "
            f"{config.accumulate}: choose a multiple of {parts}, such as {-(-config.batch_size // parts) * parts}"
        )


def check_ranges(config: TrainConfig) -> None:
    """Raise `UserError` for an option of every program that is out of its range."""
    for name in ("epochs", "batch_size", "accumulate", "checkpoint_steps"):
        require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("workers", "threads", "seed"):
        require(config, name, getattr(config, name) >= 0, "0 or more")
    for name in ("warmup_epochs", "weight_decay"):
        require(config, name, 0.0 <= getattr(config, name) < float("inf"), "0 or more")
    require(config, "seed", config.seed < 2**63, "below 2^63")
    require(config, "threads", config.threads <= 2**16, "65536 or less")
    require(config, "lr", 0.0 < config.lr < float("inf"), "above 0")
    require(config, "label_smoothing", 0.0 <= config.label_smoothing < 1.0, "in 0..1, below 1")
