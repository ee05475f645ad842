"""A part of the GPU benchmark, and its inputs."""

import importlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from str_triton.files import write_atomically

T = TypeVar("T")
REHEARSAL_SECONDS = 600  # A rehearsal measures nothing, and its processor may be slow or busy.


@dataclass
class Session:
    """The inputs of a part.

    Attributes:
        device: "cuda"; or "cpu" for a rehearsal: the same code with tiny sizes, for tests where no GPU is at hand.
        folder: an empty folder, whose `result.json` holds what has been measured so far.
        seconds: after how many seconds the part is stopped; what it has reported by then is kept.
    """

    device: str
    folder: Path
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def pick(self, real: T, rehearsal: T) -> T:
        """Return the size for a GPU, or for a rehearsal."""
        return rehearsal if self.device == "cpu" else real

    def seconds_left(self) -> float:
        """Return how long the part may go on."""
        return self.seconds - (time.monotonic() - self.begin)

    def report(self, **figures: Any) -> None:
        """Add figures to the part's result, and keep it on disk."""
        self.result |= figures
        write_atomically(self.folder / "result.json", json.dumps(self.result))
        for name, figure in figures.items():
            print(f"  {name}: {json.dumps(figure)}", flush=True)


@dataclass(frozen=True)
class Part:
    """A named part: `run(session)` of the module benchmarks.gpu.MODULE, on a GPU stopped after `seconds`."""

    name: str
    module: str
    seconds: int
    options: dict[str, Any] = field(default_factory=dict)

    def limit(self, device: str) -> int:
        """Return after how many seconds the part is stopped."""
        return self.seconds if device == "cuda" else REHEARSAL_SECONDS

    def run(self, session: Session) -> None:
        """Import the part's module, and run it in this process."""
        importlib.import_module(f"benchmarks.gpu.{self.module}").run(session, **self.options)


# In this order; together they take less than 8 minutes.
PARTS = {
    part.name: part
    for part in (
        Part("tests", "gpu_tests", 165),
        Part("sanitizer", "sanitizer", 40),
        Part("solve", "solve", 20),
        Part("many tensors", "many_tensors", 20),
        Part("time loops", "time_loops", 75),
        Part("training step", "training_step", 45, {"compiled": False}),
        Part("training step, compiled", "training_step", 90, {"compiled": True}),
        Part("exactness", "exactness", 20),
    )
}
