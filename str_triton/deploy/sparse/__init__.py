"""Networks with zeros in their weights, executed fast on this machine's processor."""

from str_triton.deploy.sparse.model import SparseModel, compile_sparse

__all__ = ["SparseModel", "compile_sparse"]
