"""Networks that classify image files, from every kind of file that the programs write."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from str_triton import deploy
from str_triton.cnn.data.common import NetworkInput
from str_triton.cnn.data.decoding import crop_of, decode
from str_triton.cnn.rebuild import rebuild
from str_triton.cnn.weights import recurrent
from str_triton.training.errors import UserError, one_line
from str_triton.training.interface import Interface

Scores = Callable[[Tensor], Tensor]
"""A network: normalised images, float32 [B, C, H, W], to scores [B, classes]."""


class Predictor:
    """A network that classifies image files as its data set's test images were classified.

    Args:
        scores: the network, on `device`.
        interface: its inputs and outputs, with images and normalisation.
    """

    def __init__(self, scores: Scores, interface: Interface, device: torch.device | str = "cpu") -> None:
        taken = NetworkInput.of(interface)
        assert taken is not None
        self.scores, self.names, self.device = scores, interface.outputs, torch.device(device)
        self.images, self.normalise = taken.images, taken.normalisation

    @torch.inference_mode()
    def check(self, path: str | os.PathLike[str]) -> None:
        """Raise `UserError` if the network does not take such images, or has another number of scores than names."""
        channels, height, width = self.images.channels, self.images.height, self.images.width
        try:
            scores = self.scores(torch.zeros(1, channels, height, width, device=self.device))
        except (RuntimeError, ValueError, AssertionError) as error:  # networks raise these
            size = f"{channels} x {height} x {width}"
            raise UserError(f"{path} does not take images of {size}: {one_line(error)[:200]}") from error
        if scores.shape != (1, len(self.names)):
            raise UserError(f"{path} gives {scores.shape[-1]} scores, but its interface names {len(self.names)}")

    def pixels(self, name: str, content: str | bytes) -> Tensor:
        """Decode an image file, by its path or bytes, to uint8 [C, H, W]. Raise ValueError, which names the image."""
        images = self.images
        size, crop = (images.height, images.width), crop_of(images.crop)
        return torch.from_numpy(decode(name, content, size, crop, channels=images.channels)).permute(2, 0, 1)

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor], top: int) -> list[list[tuple[str, float]]]:
        """Return the names and probabilities of the `top` most probable classes of each image."""
        images = self.normalise(torch.stack(list(pixels)).to(self.device))
        best = self.scores(images).float().softmax(1).topk(min(top, len(self.names)))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.names[index], value) for index, value in zip(*row, strict=True)] for row in rows]


def open_predictor(
    path: str | os.PathLike[str], model: str | None = None, interface: str | None = None, device: str = "auto"
) -> Predictor:
    """Open a run's folder or a file that holds a network.

    Args:
        path: a run, an ONNX file, a compiled sparse network, or a file for `rebuild`.
        model: the network's name, for a file of weights that does not hold it.
        interface: a file like interface.json, in place of the one in the run or file.
        device: "auto", "cpu" or "cuda"; ONNX files and compiled networks run on the CPU.

    Raises:
        ValueError, OSError: `path` or `interface` cannot be read, or do not fit each other.
        UserError: the network's interface is unknown, or there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    given = None if interface is None else Interface.read(Path(interface))
    where = torch.device("cpu")
    found = _onnx(Path(path)) if _is_onnx(Path(path)) else _compiled(Path(path))
    if found is None:
        network = rebuild(path, model)
        where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        found = network.model.to(where), network.interface
    scores, held = found
    predictor = Predictor(scores, _complete(given or held, path if interface is None else interface), where)
    predictor.check(path)
    return predictor


def _complete(interface: Interface | None, path: str | os.PathLike[str]) -> Interface:
    """Return the interface; raise `UserError` if it is missing or lacks what images need."""
    if interface is None:
        raise UserError(
            f"{path} does not hold class names, image size and normalisation: name a file like the interface.json of a "
            "run with --interface"
        )
    if NetworkInput.of(interface) is None:
        raise UserError(f"{path}: the interface is not that of a network for images")
    return interface


def _is_onnx(path: Path) -> bool:
    """Return whether a file is ONNX by its name, or by its first bytes: a version and the name of what wrote it."""
    if path.suffix.lower() == ".onnx":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begin = file.read(9)
    return begin[:1] == b"\x08" and begin[2:3] == b"\x12" and begin[8:] != b"{"  # safetensors' ninth byte


def _onnx(path: Path) -> tuple[Scores, Interface | None]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs the package onnxruntime: pip install 'str-triton[onnx]'") from error
    content = path.read_bytes()
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        raise ValueError(f"{path} is not an ONNX file: {str(error).splitlines()[0]}") from None
    names = [value.name for value in session.get_inputs()]
    metadata = session.get_modelmeta().custom_metadata_map
    if "outputs" in metadata and "images" not in metadata:
        raise ValueError(recurrent(path))
    if len(names) != 1:
        raise ValueError(f"{path}: the network has {len(names)} inputs, not one for images")

    def scores(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {names[0]: images.numpy()})[0])
        except Exception as error:  # onnxruntime's errors have no common base class
            raise ValueError(str(error).splitlines()[0]) from None

    return scores, Interface.in_metadata(metadata, path)


def _compiled(path: Path) -> tuple[Scores, Interface | None] | None:
    """Return the compiled network in a packed file and its interface; None for another file or a folder."""
    if not path.is_file():
        return None
    try:
        metadata = deploy.inspect(path).metadata
    except ValueError:  # `rebuild` reads other kinds of files, and says what is wrong with the rest
        return None
    if "sparse" not in metadata:
        return None
    return deploy.load_sparse(path), Interface.in_metadata(metadata, path)
