"""Export of a trained network: python -m str_triton.cnn.export pack|onnx|sparse RUN|FILE OUT [OPTIONS]."""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from str_triton import count, deploy
from str_triton.cnn.data import load
from str_triton.cnn.rebuild import Network, rebuild
from str_triton.files import percent
from str_triton.programs import command
from str_triton.training.errors import UserError, as_user_error, one_line, run_program, tell
from str_triton.training.interface import LONGEST
from str_triton.training.options import positional, read_command

NAMES_SHOWN = 20  # class names in the model card
PURPOSE = (
    "Export a trained convolutional network: as a packed file, as ONNX, or compiled for sparse execution on this "
    "machine's CPU."
)
LOAD = """from str_triton.cnn.models import build
from str_triton import deploy

model = build({name!r}, num_classes={classes}, in_channels={channels})
model.load_state_dict(deploy.unpack({file!r}))  # damaged bytes raise
model.eval()"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every command."""

    path: str = positional("RUN|FILE")
    """A finished run's folder, one of its checkpoints, or a file of weights."""
    out: str = positional("OUT")
    """The file to write."""
    model: str | None = None
    """The network's name, as for training; needed for a file that does not hold it."""
    image_size: int | None = None
    """Height and width of the images; by default those of the run's data set."""


@dataclass(frozen=True, kw_only=True)
class Pack(Options):
    """Write a packed file without the zeros, and a model card beside it. Negative zeros become positive zeros."""

    values: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type of the stored weights; vectors (biases, norms) keep theirs."""


@dataclass(frozen=True, kw_only=True)
class Onnx(Options):
    """Write an ONNX file for any batch size. Zeros are stored, batch norms are folded into the convolutions."""


@dataclass(frozen=True, kw_only=True)
class Sparse(Options):
    """Write a network that skips its zeros on this machine's CPU, for str_triton.deploy.load_sparse."""

    batch_size: int = 1
    """Images in a batch; the fastest execution of each layer is chosen for this size."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""
    return run_program(partial(program, args))


def program(args: Sequence[str] | None) -> None:
    """Read the network that ``args`` name, and run their command."""
    kinds: dict[str, type] = {"pack": Pack, "onnx": Onnx, "sparse": Sparse}
    options = read_command(kinds, args, prog=command("export-cnn"), description=PURPOSE)
    check(options)
    with as_user_error(ValueError, OSError):
        network = rebuild(options.path, options.model)
    example = torch.zeros(1, *image_shape(options, network))
    {Pack: pack, Onnx: onnx, Sparse: sparse}[type(options)](options, network, example)


def check(options: Options) -> None:
    """Raise `UserError` for options out of range, before any file is read."""
    if not Path(options.out).parent.is_dir():
        raise UserError(f"{options.out}: there is no such directory")
    if isinstance(options, Pack) and options.out.endswith(".md"):
        raise UserError(f"{options.out}: the model card takes this name; give the packed file another ending")
    if Path(options.out).is_dir():
        raise UserError(f"{options.out} is a directory: name the file to write")
    if Path(options.out).exists() and not Path(options.out).is_file():
        raise UserError(f"{options.out}: exists and is no regular file")
    for name, highest in (("image_size", LONGEST), ("batch_size", 2**31)):
        value = getattr(options, name, None)
        if value is not None and not 1 <= value <= highest:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be 1 to {highest}")


def image_shape(options: Options, network: Network) -> tuple[int, int, int]:
    """Return channels, height and width of the network's images: by the options, its interface, or its run's data."""
    if options.image_size is not None:
        return network.in_channels, options.image_size, options.image_size
    if network.interface is not None and network.interface.images is not None:
        images = network.interface.images
        return images.channels, images.height, images.width
    if network.config is None:
        raise UserError(f"{options.path} does not belong to a run, so its image size is unknown: give --image-size")
    try:
        config = network.config
        ignored: list[str] = []  # An image that cannot be decoded does not matter here.
        return load(config.data, config.data_dir, on_corrupt=ignored.append, image_size=config.image_size).image_shape
    except (ValueError, OSError) as error:
        raise UserError(f"{one_line(error)}; with --image-size the run's data are not read") from error


def pack(options: Pack, network: Network, example: Tensor) -> None:
    """Write the packed file and its model card, and print a table of its tensors."""
    budget = count(network.model, example)
    facts = known_facts(options, network, example)
    with as_user_error(ValueError, OSError):
        metadata = {"model": network.name, "num_classes": network.num_classes, "image_shape": list(example.shape[1:])}
        metadata |= described(network, example)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the summary also says if no tensor got smaller
            summary = deploy.pack(
                network.model, options.out, options.values, budget=budget, metadata=metadata, plain_zeros=True
            )
        shape = "x".join(map(str, example.shape[1:]))
        card = deploy.model_card(
            options.out,
            title=f"{network.name}, {percent(budget.sparsity)} sparse",
            description=f"A sparse {network.name} for images of {shape} and {network.num_classes} classes.",
            facts={**facts, **input_facts(network), "sparsity": percent(budget.sparsity), "FLOPs": f"{budget.flops:,}"},
            code=LOAD.format(
                file=Path(options.out).name,
                name=network.name,
                classes=network.num_classes,
                channels=network.in_channels,
            ),
            tags=("image-classification",),
            pipeline_tag="image-classification",
        )
    print(f"{summary}\n\nwrote {options.out} and {card}")


def described(network: Network, example: Tensor) -> dict[str, Any]:
    """Return the network's interface as metadata, for images of the example's size; {} if it is unknown."""
    interface = network.interface
    if interface is None:
        return {}
    if interface.images is not None:  # --image-size may differ from the run's
        height, width = example.shape[2:]
        interface = replace(interface, images=replace(interface.images, height=height, width=width))
    return interface.record()


def input_facts(network: Network) -> dict[str, str]:
    """Return the facts about images and classes for the model card."""
    interface = network.interface
    if interface is None:
        return {}
    facts = {}
    if interface.images is not None:
        facts["images"] = f"{interface.images.part()}, scaled by bilinear interpolation with antialiasing"
    if interface.standardisation is not None:
        mean, std = (", ".join(f"{number:g}" for number in numbers) for numbers in interface.standardisation)
        facts["normalisation"] = f"(pixel - mean) / deviation, pixels 0 to 255, mean {mean}, deviation {std}"
    names = interface.outputs
    shown = "; ".join(names[:NAMES_SHOWN]) + ("; ..." if len(names) > NAMES_SHOWN else "")
    return facts | {"classes": f"{len(names)}: {shown} (all in the file's metadata, `outputs`)"}


def known_facts(options: Pack, network: Network, example: Tensor) -> dict[str, str]:
    """Return the facts for the model card that the folder of a finished run holds.

    The accuracy is left out if the card is for images of another size than the run's.
    """
    summary = Path(options.path) / "summary.json"
    if network.config is None or not summary.is_file():
        return {}
    facts, images = {"data": network.config.data}, network.interface and network.interface.images
    measured = images and (images.height, images.width)
    if options.image_size is not None and measured != example.shape[2:]:
        return facts
    with as_user_error(OSError):
        text = summary.read_text(encoding="utf-8", errors="replace")
    try:
        accuracy = float(json.loads(text)["accuracy"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{summary} is damaged, it holds no accuracy: restore it, or remove it to do without") from None
    rounded = "" if options.values == "float32" else ", before rounding"
    return facts | {f"accuracy on the test images{rounded}": f"{100 * accuracy:.2f} %"}


def onnx(options: Onnx, network: Network, example: Tensor) -> None:
    """Export to ONNX, check the result, and write the file."""
    metadata = {name: json.dumps(value) for name, value in described(network, example).items()}
    with as_user_error(ValueError, OSError, ImportError):
        file = deploy.export_onnx(
            network.model,
            example,
            inputs=["images"],
            outputs=["scores"],
            metadata={"model": network.name, **metadata},
        )
        file.save(options.out)
    shape = ", ".join(map(str, example.shape[1:]))
    print(
        f"wrote {options.out}: {len(file.content):,} bytes, images [batch, {shape}] -> "
        f"scores [batch, {network.num_classes}]; largest difference to PyTorch {file.difference:.2g}"
    )


def sparse(options: Sparse, network: Network, example: Tensor) -> None:
    """Compile the network, write it, and print the execution chosen for each layer."""
    tell(f"compiling {network.name}: measuring the executions of every layer, which can take minutes")
    with as_user_error(ValueError, OSError):
        compiled = deploy.compile_sparse(network.model, example.expand(options.batch_size, -1, -1, -1).contiguous())
        compiled.save(options.out, {"model": network.name, **described(network, example)})
    print(f"{compiled}\n\nwrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
