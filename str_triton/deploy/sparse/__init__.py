"""Networks with zeros in their weights, executed fast on this machine's processor."""

from str_triton.deploy.sparse.model import CompiledModel, SparseModel, compile_sparse, load_sparse

__all__ = ["CompiledModel", "SparseModel", "compile_sparse", "load_sparse"]
