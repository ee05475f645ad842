"""Result files of studies: one line of JSON per run, appended as soon as the run ends.

A study that is started again skips the runs that its file already holds. A line that was cut short by a kill is ignored
when the file is read, and removed by the next run.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Run = dict[str, Any]


class RunFile:
    """A result file with a line per run.

    Args:
        path: the file. It need not exist, nor its folder.
        key: the fields that identify a run. Reading does not need them.
    """

    def __init__(self, path: Path, key: Iterable[str] = ()) -> None:
        self.path, self.key = path, tuple(key)

    def read(self) -> list[Run]:
        """Return all runs, in the order of the file."""
        return [json.loads(line) for line in self._text().splitlines()]

    def missing(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Yield the runs that the file does not hold, each once.

        The file is read before each run, so that two processes can share it. `runs` need only have the key's fields.
        """
        yielded = set()
        for run in runs:
            identity = self._identity(run)
            if identity not in yielded and identity not in {self._identity(held) for held in self.read()}:
                yielded.add(identity)
                yield run

    def append(self, run: Run) -> None:
        """Append a run as one line. KeyError: the run lacks a field of the key, by which it would never be found."""
        self._identity(run)
        line = json.dumps(run) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = len(self._text().encode())
        if self.path.exists() and self.path.stat().st_size > kept:
            with self.path.open("r+b") as file:
                file.truncate(kept)
        with self.path.open("a") as file:
            file.write(line)

    def _text(self) -> str:
        """Return the file's complete lines."""
        text = self.path.read_text() if self.path.exists() else ""
        return text[: text.rfind("\n") + 1]

    def _identity(self, run: Run) -> tuple:
        return tuple(run[field] for field in self.key)
