"""Export of a module to ONNX, checked by ONNX's checker and by running the result."""

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.deploy.onnx_export.qdq import QdqNetwork, separate_constants
from str_triton.deploy.onnx_export.translations import onnx_translations
from str_triton.deploy.projections import replace_projections
from str_triton.deploy.sparse.quantize.model import QuantizedModel
from str_triton.files import write_atomically
from str_triton.programs import extra_named

# The largest differences to PyTorch, relative to the largest output where that is above 1.
TOLERANCE = 1e-4
FLIPS = 5e-2  # of a quantized network, some of whose codes are rounded the other way
OTHER_SIZES = (1, 3)  # of the batch in the check; other dynamic axes are longer than the example's by as much
Axes = tuple[int, ...]


@dataclass(frozen=True)
class OnnxFile:
    """A checked ONNX file: its bytes, and the largest difference between onnxruntime's outputs and PyTorch's."""

    content: bytes
    difference: float

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        write_atomically(path, self.content)


def export_onnx(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    dynamic: Sequence[int] | Sequence[Sequence[int]] = (0,),
    metadata: Mapping[str, str] | None = None,
) -> OnnxFile:
    """Export a module in evaluation mode to ONNX, and compare onnxruntime's outputs with the module's.

    LowRank layers keep their factors, as two products in a Scan over time. Zeros of sparse layers are stored. Batch
    norms are folded into the convolutions before them. The module does not change. Call `compact()` on low-rank layers
    first: components that a threshold removes are exported otherwise.

    A network of `quantize` becomes float32 operations between QuantizeLinear and DequantizeLinear, with int8 weights by
    channel and int32 biases: onnxruntime and OpenVINO fuse them into operations on integers. onnxruntime's integers are
    equal to ours in layers without a residual sum or an activation other than ReLU and ReLU6. Other codes may differ by
    one step, because these operations are rounded in another order.

    Args:
        module: the module.
        example: the module's inputs, on its device.
        inputs, outputs: names of the inputs and outputs.
        dynamic: the axes of every input whose sizes may differ from the example's, or a sequence of axes for each
            input. The first axis is the batch. For recurrent layers of this library (0, 1) also allows any number of
            steps.
        metadata: texts for the file.

    Raises:
        ValueError: PyTorch cannot export the module, or the outputs differ; the message names the module. Or `dynamic`
            does not fit the inputs.
        ImportError: onnx, onnxruntime or onnxscript is missing.
    """
    name = type(module).__name__
    module = copy.deepcopy(module).eval()
    example = example if isinstance(example, tuple) else (example,)
    axes = _axes_of_each(dynamic, example)
    with extra_named("onnx", "exporting to ONNX"):
        import onnx
        import onnxruntime

        traced = QdqNetwork(module) if isinstance(module, QuantizedModel) else replace_projections(module)
        proto = _exported(traced, example, name, inputs, outputs, axes)  # imports onnxscript
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    with _as_value_error(name):
        onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # Else sums of int8 products saturate on AVX2.
    with _as_value_error(name):
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    difference = max(_difference(module, session, _resized(example, axes, size)) for size in OTHER_SIZES)
    # Two roundings of one network in float32 differ by about the sum of their errors.
    most = FLIPS + 2 * module.report.error if isinstance(module, QuantizedModel) else TOLERANCE
    if not difference <= most:
        raise ValueError(f"{name}: as ONNX its outputs differ by {difference:.2g}, more than {most}")
    return OnnxFile(content, difference)


def _axes_of_each(dynamic: Sequence[int] | Sequence[Sequence[int]], example: tuple[Tensor, ...]) -> list[Axes]:
    """Return the dynamic axes of each input."""
    common = [axis for axis in dynamic if isinstance(axis, int)]
    each = [tuple(axes) for axes in dynamic if not isinstance(axes, int)]
    if not each:
        return [tuple(axis for axis in common if axis < x.dim()) for x in example]
    if common or len(each) != len(example):
        raise ValueError(f"dynamic={dynamic}: give axes, or a sequence of axes for each of the {len(example)} inputs")
    return each


def _exported(
    module: nn.Module,
    example: tuple[Tensor, ...],
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: list[Axes],
) -> Any:
    translations = onnx_translations()
    # torch.export may treat a size of 1 as fixed.
    example = tuple(
        torch.cat([x, x], axes[0]) if axes and x.shape[axes[0]] == 1 else x
        for x, axes in zip(example, dynamic, strict=True)
    )
    shapes = [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in dynamic]
    try:
        with _quiet(), torch.no_grad():
            # torch.onnx.export alone tries slower ways of exporting one after the other, for minutes.
            by_name = inspect.signature(module.forward).bind(*shapes).arguments  # *args has a tuple
            exported = torch.export.export(module, example, dynamic_shapes=by_name)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                input_names=list(inputs) or None,
                output_names=list(outputs) or None,
                custom_translation_table=translations,
                verbose=False,
            )
    except ImportError:
        raise
    except Exception as error:  # torch.export raises many types
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{name}: PyTorch cannot export this module to ONNX: {reason}") from error
    proto = program.model_proto  # type: ignore[union-attr]  # None only with dynamo=False
    if isinstance(module, QdqNetwork):
        separate_constants(proto)
    for node in proto.graph.node:  # the metadata hold paths of this machine
        del node.metadata_props[:]
    return proto


@contextmanager
def _as_value_error(name: str) -> Iterator[None]:
    """Turn the errors of onnx and onnxruntime, which have no common base, into ``ValueError``."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: the exported file does not run: {reason}") from error


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


def _resized(example: tuple[Tensor, ...], dynamic: list[Axes], size: int) -> tuple[Tensor, ...]:
    """Return random inputs like the example, with the batch `size`, and the other dynamic axes longer by `size`."""
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor, axes: Axes) -> Tensor:
        sizes = list(x.shape)
        for axis in axes:
            sizes[axis] = size if axis == axes[0] else sizes[axis] + size
        if x.is_floating_point():
            return torch.randn(sizes, generator=generator, dtype=x.dtype).to(x.device)
        return torch.randint(int(x.max()) + 1, sizes, generator=generator).to(x)

    return tuple(map(drawn, example, dynamic))


@torch.inference_mode()
def _difference(module: nn.Module, session: Any, inputs: tuple[Tensor, ...]) -> float:
    expected = list(_tensors(module(*inputs)))
    names = [value.name for value in session.get_inputs()]
    with _as_value_error(type(module).__name__):
        given = session.run(None, {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)})
    differences = [
        float((torch.from_numpy(own) - wanted.cpu()).abs().max() / wanted.abs().max().clamp(min=1).cpu())
        for own, wanted in zip(given, expected, strict=True)
    ]
    return max(differences)


def _tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors of nested outputs in their order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
