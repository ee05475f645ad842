"""Measure accuracy, budget and throughput of a trained network: python cnn/evaluate.py RUN|FILE [OPTIONS]."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from str_triton import Budget, count
from str_triton.cnn.data import Data, batches, load
from str_triton.cnn.data.common import NetworkInput, OnCorrupt
from str_triton.cnn.rebuild import Network, rebuild, require_classes
from str_triton.files import percent, write_atomically
from str_triton.programs import command
from str_triton.training.environment import describe_environment
from str_triton.training.errors import UserError, as_user_error, run_program, warn
from str_triton.training.interface import LONGEST
from str_triton.training.meter import Meter
from str_triton.training.options import positional, read_options

PROGRAM = "evaluate"
PURPOSE = "Measure accuracy, budget and throughput of a trained network."
TOP = 5
ROUNDS = range(3, 20)  # the least and the largest number of batches to time the network alone with
SECONDS = 3.0  # no further batch is timed after this time


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the program."""

    path: str = positional("RUN|FILE")
    """A finished run's folder, one of its checkpoints, a checkpoint of the paper's original code, or a file of weights
    (safetensors, or a state dict that torch.save wrote)."""
    model: str | None = None
    """The network's name, as for training; needed for a file that does not hold it."""
    data: str | None = None
    """Data set, as for training; by default that of the run."""
    data_dir: str | None = None
    """Directory of the published files, as for training."""
    image_size: int | None = None
    """Height and width that images are scaled to; by default those of the images that the network was trained with."""
    batch_size: int = 64
    """Images in a batch."""
    workers: int = 0
    """Processes that read images; with 0 the program itself reads them."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them; on a run's own data, what the run did is the default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU if there is one."""
    json: str | None = None
    """Also write all results to this JSON file."""


@dataclass(frozen=True)
class Accuracy:
    """The number of test images, their mean loss, and the top-1 and top-5 accuracy.

    ``top5`` is None for five classes or fewer. ``images_per_second`` includes reading, decoding, copying to the device
    and the network.
    """

    images: int
    loss: float
    top1: float
    top5: float | None
    images_per_second: float


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""
    return run_program(partial(program, args))


def program(args: Sequence[str] | None) -> None:
    """Evaluate the network that ``args`` name, print a table, and write the results with --json."""
    options = read_options(Options, args, prog=command(PROGRAM), description=PURPOSE)
    device = check(options)
    with as_user_error(ValueError, OSError):
        network = rebuild(options.path, options.model)
        options = completed(options, network)
        data = read_data(options, network)
    corrupt = list(data.left_out)
    on_corrupt = corrupt.append if options.skip_corrupt else None
    model = network.model.to(device)
    budget = count(model, torch.zeros(1, *data.image_shape, device=device))
    alone = throughput(model, data.image_shape, options.batch_size, device)
    accuracy = measure(model, partial(examples, data, options, device, on_corrupt), device, data.num_classes > TOP)
    for line in sorted(set(corrupt)):
        warn(f"left out: {line}")
    print(f"{options.path}: {network.name} on {options.data}, {accuracy.images:,} images\n\n{budget}\n")
    print("\n".join(lines(accuracy, alone, budget, options.batch_size, device)))
    if options.json is not None:
        content = {"path": options.path, "model": network.name, "data": options.data, **asdict(accuracy)}
        content |= {"corrupt": len(set(corrupt))}
        content |= {"model_images_per_second": alone, "batch_size": options.batch_size}
        content |= {"budget": totals(budget), "environment": describe_environment(device)}
        with as_user_error(OSError):
            write_atomically(Path(options.json), json.dumps(content, indent=2) + "\n")


def check(options: Options) -> torch.device:
    """Return the device to compute on. Raise `UserError` for options out of range, before any file is read."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: it must be at least 1")
    if options.image_size is not None and not 1 <= options.image_size <= LONGEST:
        raise UserError(f"--image-size {options.image_size}: it must be 1 to {LONGEST}")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: it must be 0 or more")
    if options.json is not None and not Path(options.json).parent.is_dir():
        raise UserError(f"--json {options.json}: there is no such directory")
    if options.json is not None and Path(options.json).is_dir():
        raise UserError(f"--json {options.json} is a directory: name the file to write")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    gpu = options.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def completed(options: Options, network: Network) -> Options:
    """Return the options with the data set of the network's run where they name none.

    On the run's own data, its directory and --skip-corrupt apply too. Raise `UserError` if there is no data set.
    """
    config = network.config
    if options.data is None and config is None:
        raise UserError(f"{options.path} does not belong to a run, so its data set is unknown: name one with --data")
    if config is None or options.data not in (None, config.data):
        return options
    return replace(
        options,
        data=config.data,
        data_dir=options.data_dir or config.data_dir,
        skip_corrupt=options.skip_corrupt or config.skip_corrupt,
    )


def read_data(options: Options, network: Network) -> Data:
    """Read the data set, with the test images as the network takes them.

    Without an interface of the network the data decide, as for training. Raise `UserError` for data of other classes or
    channels than the network's.
    """
    assert options.data is not None
    taken_by, image_size = NetworkInput.of(network.interface), options.image_size
    if taken_by is None:
        image_size = image_size or (network.config.image_size if network.config else None)
    elif image_size is not None:
        own = taken_by.images
        if (own.height, own.width) != (image_size, image_size):
            warn(f"--image-size {image_size}: {options.path} was trained with images of {own.width}x{own.height}")
        taken_by = replace(taken_by, images=replace(own, height=image_size, width=image_size))
    ignored: list[str] = []  # Corrupt training images do not matter here. `left_out` holds the corrupt test images.
    on_corrupt = ignored.append if options.skip_corrupt else None
    data = load(options.data, options.data_dir, on_corrupt, image_size, taken_by)
    require_classes(network, data.class_names, f"{options.path}, --data {options.data}")
    if data.image_shape[0] != network.in_channels:
        raise UserError(
            f"--data {options.data} has {data.image_shape[0]} colour channels, the network in {options.path} "
            f"{network.in_channels}"
        )
    return data


def examples(
    data: Data, options: Options, device: torch.device, on_corrupt: OnCorrupt
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of the test images and their labels on the device, each image once."""
    with as_user_error(ValueError, OSError):
        yield from batches(
            data.test,
            batch_size=options.batch_size,
            seed=0,
            epoch=0,
            augment=False,
            shuffle=False,
            workers=options.workers,
            device=device,
            on_corrupt=on_corrupt,
        )


@torch.inference_mode()
def measure(
    model: nn.Module, all_batches: Callable[[], Iterator[tuple[Tensor, Tensor]]], device: torch.device, with_top5: bool
) -> Accuracy:
    """Measure loss, accuracy and throughput over one pass through the test images."""
    meter, among_first = Meter(device), torch.zeros((), dtype=torch.int64, device=device)
    begin, images = time.perf_counter(), 0
    for batch, labels in all_batches():
        if len(labels) == 0:  # all images of the batch are corrupt
            continue
        outputs = model(batch)
        meter.add(F.cross_entropy(outputs, labels), outputs, labels)
        if with_top5:
            among_first += (outputs.topk(TOP, dim=1).indices == labels[:, None]).sum()
        images += len(labels)
    if images == 0:
        raise UserError("none of the test images can be decoded")
    means = meter.means()  # synchronizes with the device
    if not math.isfinite(means.loss):
        raise UserError("the network's scores of the test images are NaN or infinite")
    seconds = time.perf_counter() - begin
    top5 = among_first.item() / images if with_top5 else None
    return Accuracy(images, means.loss, means.accuracy, top5, images / seconds)


@torch.inference_mode()
def throughput(model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, device: torch.device) -> float:
    """Measure the network's throughput in images per second, as the median over batches that are on the device."""
    images = torch.randn(batch_size, *image_shape, device=device)
    seconds: list[float] = []
    model(images)
    while len(seconds) < ROUNDS.start or (len(seconds) < ROUNDS.stop and sum(seconds) < SECONDS):
        begin = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return batch_size / median(seconds)


def lines(accuracy: Accuracy, alone: float, budget: Budget, batch_size: int, device: torch.device) -> Iterator[str]:
    """Yield the lines of text below the table."""
    top5 = "" if accuracy.top5 is None else f"top-5 {100 * accuracy.top5:.2f} %  "
    yield f"accuracy {100 * accuracy.top1:.2f} %  {top5}loss {accuracy.loss:.4f}"
    share = percent(budget.flops / budget.dense_flops)
    yield f"sparsity {percent(budget.sparsity)}  FLOPs {share} of dense, {budget.flops:,} an image"
    where = f"cpu, threads: {torch.get_num_threads()}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    yield (
        f"throughput {alone:,.0f} images/s (the network alone, batches of {batch_size}, {where}), "
        f"{accuracy.images_per_second:,.0f} images/s with reading"
    )


def totals(budget: Budget) -> dict[str, Any]:
    """Return the budget as plain values."""
    keys = ("params", "nonzeros", "sparsity", "dense_flops", "flops")
    rows = [
        {"name": row.name, **{key: getattr(row, key) for key in keys}, "covered": row.covered} for row in budget.rows
    ]
    all_keys = (*keys, "uncovered_params", "uncovered_nonzeros", "total_sparsity")
    return {**{key: getattr(budget, key) for key in all_keys}, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
