"""A progress bar on standard error for loops that take long."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

UNTIMED_SECONDS, SILENT_SECONDS = 1.0, 2.0  # the estimate of the time left ignores the first second

Item = TypeVar("Item")


def with_progress(items: Sequence[Item], text: str) -> Iterator[Item]:
    """Yield `items`; after two seconds show a progress bar with `text` and the time left on standard error."""
    began, bar = time.monotonic(), None
    try:
        for number, item in enumerate(items):
            yield item
            waited = time.monotonic() - began
            if bar is None and waited > UNTIMED_SECONDS:
                from rich.console import Console

                from str_triton.training.progress import ProgressBar

                console = Console(stderr=True, soft_wrap=True, highlight=False)
                bar = ProgressBar(len(items), number + 1, console=console)
            if bar is not None and waited > SILENT_SECONDS and bar.due:
                bar.show(number + 1, text)
    finally:
        if bar is not None:
            bar.close()
