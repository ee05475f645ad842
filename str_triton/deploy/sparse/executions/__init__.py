"""The executions of a layer. A new one is a file here and an entry in this list."""

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.executions.csr import Csr
from str_triton.deploy.sparse.executions.dense import ChannelsLast, Dense
from str_triton.deploy.sparse.executions.kernel import Kernel
from str_triton.deploy.sparse.executions.recurrent import Loop, SharedLoop, TorchLayer

EXECUTIONS: dict[str, Execution] = {
    execution.name: execution
    for execution in (Dense(), ChannelsLast(), Csr(), Kernel(), Loop(), SharedLoop(), TorchLayer())
}

__all__ = ["EXECUTIONS", "Execution", "Shapes"]
