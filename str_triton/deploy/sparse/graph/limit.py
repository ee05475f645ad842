"""A limit on the time that torch.export takes."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import fx

SECONDS = 30.0  # for the attempts to export one model with open sizes, and again for one with fixed sizes


class Limit:
    """A share of the processor time of the thread that creates it, so that other processes make no difference."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = max(seconds, 0.0), time.thread_time() + seconds

    def share(self, part: float) -> "Limit":
        """Return a limit of this part of the time that is left."""
        return Limit(part * (self._end - time.thread_time()))

    def is_over(self) -> bool:
        return time.thread_time() > self._end

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Raise TimeoutError where this thread traces an operation after the limit.

        torch.export and retraces create a node of a graph for each operation, and run the nodes of graphs. A model's
        own operations may fail there, too, so torch leaves nothing behind.
        """
        thread = threading.get_ident()

        def in_time(step: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(step)
            def checked(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() == thread and self.is_over():
                    raise TimeoutError(str(self))
                return step(*args, **kwargs)

            return checked

        with (
            mock.patch.object(fx.Graph, "create_node", in_time(fx.Graph.create_node)),
            mock.patch.object(fx.Interpreter, "run_node", in_time(fx.Interpreter.run_node)),
        ):
            yield

    def __str__(self) -> str:
        return f"it was stopped after {self.seconds:.3g} s of processor time"
