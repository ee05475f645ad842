"""Result files of studies: one line of JSON per run, appended as soon as the run ends.

A study that is started again skips the runs that its file already holds. A line that was cut short by a kill is ignored
when the file is read, and removed by the next run.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
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


def at_its_rate(runs: list[Run]) -> list[Run]:
    """Return the runs at the learning rate with the highest validation accuracy at the first seed, one run or more.

    Of rates that are equal there, it is the one with the higher mean over all its seeds. The rate and the seed of a run
    are those of its `job`.
    """
    rated: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["job"]["seed"]):
        rated.setdefault(run["job"]["rate"], []).append(run)
    seed = min(run["job"]["seed"] for run in runs)
    tried = [own for own in rated.values() if own[0]["job"]["seed"] == seed]
    chosen = max(tried, key=lambda own: (own[0]["validation_accuracy"], mean(r["validation_accuracy"] for r in own)))
    return [run for run in runs if run in chosen]
