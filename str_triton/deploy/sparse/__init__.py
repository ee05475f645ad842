"""Networks with zeros in their weights, executed fast on this machine's processor."""

from str_triton.deploy.sparse import operation  # noqa: F401 (registers the operation)
from str_triton.deploy.sparse.compile import compile_sparse, load_sparse
from str_triton.deploy.sparse.model import CompiledModel, SparseModel
from str_triton.deploy.sparse.quantize.model import QuantizedModel
from str_triton.deploy.sparse.quantize.quantize import quantize

__all__ = ["CompiledModel", "QuantizedModel", "SparseModel", "compile_sparse", "load_sparse", "quantize"]
