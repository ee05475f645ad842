"""Networks with zeros in their weights, executed fast on this machine's processor."""

from str_triton.deploy.sparse import operation  # noqa: F401 (registers the operation)
from str_triton.deploy.sparse.compile import compile_sparse, load_sparse
from str_triton.deploy.sparse.model import CompiledModel, SparseModel
from str_triton.deploy.sparse.quantize.aware import quantization_aware
from str_triton.deploy.sparse.quantize.model import QuantizedModel
from str_triton.deploy.sparse.quantize.quantize import quantize
from str_triton.deploy.sparse.stepping import CompiledStep, compile_step

__all__ = [
    "CompiledModel",
    "CompiledStep",
    "QuantizedModel",
    "SparseModel",
    "compile_sparse",
    "compile_step",
    "load_sparse",
    "quantization_aware",
    "quantize",
]
