"""The executions of a layer. A new one is a file here and an entry in this list."""

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.executions.csr import Csr
from str_triton.deploy.sparse.executions.dense import ChannelsLast, Dense
from str_triton.deploy.sparse.executions.integer import Integer
from str_triton.deploy.sparse.executions.kernel import Kernel
from str_triton.deploy.sparse.executions.recurrent import RECURRENT
from str_triton.deploy.sparse.graph.nodes import Layer

EXECUTIONS: dict[str, Execution] = {
    execution.name: execution for execution in (Dense(), ChannelsLast(), Csr(), Kernel(), Integer(), *RECURRENT)
}


def kernel_name(node: Layer) -> str:
    """Return the name of the execution by the kernels that a layer may have."""
    return Integer.name if EXECUTIONS[Integer.name].fits(node, {}) else Kernel.name


__all__ = ["EXECUTIONS", "Execution", "Shapes", "kernel_name"]
