"""Classify images with a trained network: python cnn/predict.py RUN|FILE IMAGE... [OPTIONS]."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from str_triton.cnn.data.folder import images_below
from str_triton.cnn.predictor import Predictor, open_predictor
from str_triton.files import printable
from str_triton.programs import command
from str_triton.training.errors import UserError, as_user_error, one_line, run_program, warn
from str_triton.training.options import positional, read_options

PROGRAM = "predict"
PURPOSE = "Name the classes of images with a trained network."
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the program."""

    path: str = positional("RUN|FILE")
    """A finished run's folder, a file that python -m str_triton.cnn.export has written (packed, .onnx, sparse), or a
    file of weights."""
    images: tuple[str, ...] = positional("IMAGE|FOLDER", many=True)
    """Image files, and folders with images at any depth; - or nothing: one image from standard input."""
    top: int = 5
    """Classes to print for each image, the most probable first."""
    json: bool = False
    """Print a line of JSON for each image."""
    batch_size: int = 32
    """Images in a batch."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, with a warning for each. Without it such an image ends the program."""
    model: str | None = None
    """The network's name, as in python cnn/train.py; needed for a file of weights that does not hold it."""
    interface: str | None = None
    """A JSON file like the interface.json of a run: class names, images and normalisation; needed for files that do not
    hold them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU if there is one. ONNX and sparse files run on the CPU."""


class Prediction(NamedTuple):
    """The classes of an image and their probabilities, the most probable first."""

    image: str
    classes: list[tuple[str, float]]


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""
    return run_program(partial(program, args))


def program(args: Sequence[str] | None) -> None:
    """Print the classes of the images that ``args`` name."""
    options = read_options(Options, args, prog=command(PROGRAM), description=PURPOSE)
    for name in ("top", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: it must be at least 1")
    with as_user_error(ValueError, OSError):
        images = named_images(options.images)
        predictor = open_predictor(options.path, options.model, options.interface, options.device)
        for prediction in with_progress(predictions(predictor, images, options), len(images)):
            print(as_json(prediction) if options.json else as_text(prediction), flush=True)


def named_images(arguments: Sequence[str]) -> list[tuple[str, str | bytes]]:
    """Return the name of each image, and its path or the bytes of its file. Raise `UserError` if there is none."""
    found: list[tuple[str, str | bytes]] = []
    for argument in arguments or (STDIN,):
        if argument == STDIN:
            if sys.stdin.isatty():
                raise UserError("no image on standard input: name image files or a folder, or pipe an image in")
            content = sys.stdin.buffer.read()
            if not content:
                raise UserError("standard input is empty: name image files or a folder, or pipe an image in")
            found.append(("standard input", content))
        elif Path(argument).is_dir():
            paths = images_below(Path(argument))
            if not paths:
                raise UserError(f"{argument}: there is no image in this folder")
            found += [(path, path) for path in paths]
        elif Path(argument).is_file():
            found.append((argument, argument))
        else:
            raise UserError(f"{argument}: no such file or folder")
    return found


def predictions(
    predictor: Predictor, images: Sequence[tuple[str, str | bytes]], options: Options
) -> Iterator[Prediction]:
    """Yield a prediction for each image, in their order."""
    for start in range(0, len(images), options.batch_size):
        names, pixels = [], []
        for name, content in images[start : start + options.batch_size]:
            try:
                pixels.append(predictor.pixels(name, content))
                names.append(name)
            except ValueError as error:
                if not options.skip_corrupt:
                    raise
                warn(f"left out: {one_line(error)}")
        if names:
            for name, classes in zip(names, predictor(pixels, options.top), strict=True):
                if not math.isfinite(classes[0][1]):
                    raise UserError(f"{options.path}: the network's scores of {name} are NaN or infinite")
                yield Prediction(name, classes)


def with_progress(items: Iterator[Prediction], total: int) -> Iterator[Prediction]:
    """Yield the items, and show their number on stderr while they go to a file and stderr is a terminal."""
    shown = sys.stderr.isatty() and not sys.stdout.isatty() and total > 1
    for number, item in enumerate(items, start=1):
        yield item
        if shown:
            print(f"\r{number:,} of {total:,} images", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)


def as_text(prediction: Prediction) -> str:
    """Return the lines for an image: its name, and a line for each class."""
    lines = [f"{100 * probability:7.2f} %  {printable(name)}" for name, probability in prediction.classes]
    return "\n".join([printable(prediction.image), *lines])


def as_json(prediction: Prediction) -> str:
    """Return the line of JSON for an image."""
    record: dict[str, Any] = {"image": prediction.image}
    record["classes"] = [{"name": name, "probability": probability} for name, probability in prediction.classes]
    return json.dumps(record)


if __name__ == "__main__":
    sys.exit(main())
