"""How a layer is executed."""

from dataclasses import dataclass

EXECUTIONS = ("dense", "channels_last", "csr", "sparse")


@dataclass(frozen=True)
class Choice:
    """One execution of a layer, and for the microkernel ("sparse") how its work is cut.

    Attributes:
        execution: "dense" or "channels_last" (torch, in that memory format), "csr" (torch.sparse), "sparse" (our own).
        width: vectors of pixels that stay in registers.
        tiles, blocks: into how many parts the pixels and the output channels are cut, for the threads to share.
        ms_dense, ms: measured milliseconds of torch's fastest dense execution and of this one; None: not measured.
    """

    execution: str
    width: int = 4
    tiles: int = 1
    blocks: int = 1
    ms_dense: float | None = None
    ms: float | None = None
