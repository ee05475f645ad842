"""Export of any module to ONNX, checked by running the result in onnxruntime."""

from str_triton.deploy.onnx_export.export import OnnxFile, export_onnx
from str_triton.deploy.onnx_export.translations import onnx_translations

__all__ = ["OnnxFile", "export_onnx", "onnx_translations"]
