"""Networks with zeros in their weights, executed fast on this machine's processor."""

from str_triton.deploy.sparse import operation  # noqa: F401 (registers the operation)
from str_triton.deploy.sparse.compile import compile_sparse, load_sparse
from str_triton.deploy.sparse.model import CompiledModel, SparseModel

__all__ = ["CompiledModel", "SparseModel", "compile_sparse", "load_sparse"]
