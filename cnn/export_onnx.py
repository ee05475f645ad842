"""Export of a network to ONNX, checked by ONNX's checker and by running the result."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.training.errors import UserError, one_line

TOLERANCE = 1e-4
BATCHES = (1, 3)  # batch sizes of the check; the network is exported with another one


def to_onnx(
    model: nn.Module, example: Tensor, label: str, metadata: Mapping[str, str] = MappingProxyType({})
) -> tuple[bytes, float]:
    """Return the bytes of an ONNX file, and the largest difference between its scores and the model's.

    The input is "images", float32 [batch, C, H, W] with any batch size, the output "scores". Weights are dense, zeros
    included. Batch norms are folded into the convolutions before them. The difference is measured on random images,
    and relative to the largest score where that is above 1.

    Args:
        model: in evaluation mode, on the CPU.
        example: [1, C, H, W].
        label: the network's name in messages.
        metadata: entries for the file's metadata.

    Raises:
        UserError: onnx, onnxruntime or onnxscript is missing, PyTorch cannot export the network, or the scores of the
            exported network differ.
    """
    try:
        import onnx
        import onnxruntime

        proto = _exported(model, example, label)  # imports onnxscript
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs the package {error.name}: pip install 'str-triton[onnx]'") from error
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = max(_difference(model, session, example, batch) for batch in BATCHES)
    if not difference <= TOLERANCE:
        raise UserError(f"{label}: as ONNX its scores differ by {difference:.2g}, more than {TOLERANCE}; not written")
    return content, difference


def _exported(model: nn.Module, example: Tensor, label: str) -> Any:
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (torch.cat([example, example]),),  # torch.export may treat a size of 1 as fixed
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["scores"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = one_line(error.__cause__ or error)[:300]
        raise UserError(f"{label}: PyTorch cannot export this network to ONNX: {reason}") from error
    proto = program.model_proto
    for node in proto.graph.node:  # the metadata hold paths of this machine
        del node.metadata_props[:]
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's hints at torchvision and its deprecation warnings."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


@torch.inference_mode()
def _difference(model: nn.Module, session: object, example: Tensor, batch: int) -> float:
    images = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    expected = model(images)
    (scores,) = session.run(["scores"], {"images": images.numpy()})
    return float((torch.from_numpy(scores) - expected).abs().max() / expected.abs().max().clamp(min=1))
