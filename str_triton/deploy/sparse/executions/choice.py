"""The execution chosen for a layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One execution of a layer, and for the microkernel ("sparse") how its work is divided.

    Attributes:
        execution: a name in EXECUTIONS.
        width: vectors of pixels that stay in registers.
        tiles, blocks: the number of parts into which the pixels and the output channels are divided for the threads.
        ms_dense, ms: measured milliseconds of torch's fastest dense execution and of this one; None: not measured.
    """

    execution: str
    width: int = 4
    tiles: int = 1
    blocks: int = 1
    ms_dense: float | None = None
    ms: float | None = None
