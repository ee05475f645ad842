"""Deployment of sparse and low-rank networks: packed files, sparse execution on CPUs, ONNX, C."""

from str_triton.deploy.c_export import KeywordSpotter, export_c
from str_triton.deploy.hub import from_pretrained, push_to_hub, save_pretrained
from str_triton.deploy.model_card import model_card
from str_triton.deploy.onnx_export import OnnxFile, export_onnx, onnx_translations
from str_triton.deploy.pack import inspect, pack, unpack
from str_triton.deploy.sparse import (
    CompiledStep,
    QuantizedModel,
    SparseModel,
    compile_sparse,
    compile_step,
    load_sparse,
    quantization_aware,
    quantize,
)
from str_triton.deploy.state_files import Checkpoint, read_checkpoint
from str_triton.deploy.summary import PackedSummary, PackedTensor
from str_triton.deploy.torch_files import read_torch_file

__all__ = [
    "Checkpoint",
    "CompiledStep",
    "KeywordSpotter",
    "OnnxFile",
    "PackedSummary",
    "PackedTensor",
    "QuantizedModel",
    "SparseModel",
    "compile_sparse",
    "compile_step",
    "export_c",
    "export_onnx",
    "from_pretrained",
    "inspect",
    "load_sparse",
    "model_card",
    "onnx_translations",
    "pack",
    "push_to_hub",
    "quantization_aware",
    "quantize",
    "read_checkpoint",
    "read_torch_file",
    "save_pretrained",
    "unpack",
]
