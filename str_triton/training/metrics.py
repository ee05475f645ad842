"""What a run measures: one JSON object per line in metrics.jsonl, and the same numbers as TensorBoard events."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from str_triton.training.files import write_atomically

Record = dict[str, Any]


class Metrics:
    """The metrics of one run folder.

    A record is a dict with an integer "step" and a string "kind"; its other numbers become the TensorBoard scalars
    kind/name, and those of a nested dict {layer: {name: value}} become name/layer. metrics.jsonl is the source: on
    opening, it is cut back to ``step`` and the events are written again from what is left, so that nothing that a
    resumed run repeats stands twice.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        write_atomically(self.path, "".join(_line(record) for record in kept))
        self._events = _Events(folder / "events")
        for record in kept:
            self._events.add(record)
        self._file = open(self.path, "a")

    def append(self, record: Record) -> None:
        """Add one record to both places. Raises ``OSError`` when it cannot be written."""
        self._file.write(_line(record))
        self._file.flush()
        self._events.add(record)

    def sync(self) -> None:
        """Force metrics.jsonl to the disk, so that a checkpoint written after it never knows more than it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files. What a full disk did not take was reported by `append`."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._events.close()


class _Events:
    """A TensorBoard event file, written without the usual background thread: errors surface where they happen."""

    def __init__(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        self._writer = RecordWriter(open(directory / f"events.out.tfevents.{time.time():.0f}", "wb"))
        self._write(Event(file_version="brain.Event:2"))

    def add(self, record: Record) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in _scalars(record)]
        self._write(Event(step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run folder; a last line that a kill has cut short is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _scalars(record: Record) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            for layer, values in value.items():
                yield from ((f"{key}/{layer}", number) for key, number in values.items() if _is_number(number))
        elif name != "step" and _is_number(value):
            yield f"{record['kind']}/{name}", value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
