"""Metrics of a run: one JSON object per line in metrics.jsonl, and the same numbers as TensorBoard events."""

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

from str_triton.files import write_atomically
from str_triton.training.errors import warn

FILE = "metrics.jsonl"

Record = dict[str, Any]


class Metrics:
    """The metrics of one run folder.

    A record is a dict with an integer "step" and a string "kind". Its other numbers become the TensorBoard scalars
    kind/name, and those of a nested dict {layer: {name: value}} become name/layer.

    On opening, records after ``step`` are removed from metrics.jsonl, since a resumed run repeats them. Damaged lines
    are removed with a warning. If the line of ``last``, the record of the last epoch, is lost, it is added again. The
    TensorBoard events are then written again from metrics.jsonl.
    """

    def __init__(self, folder: Path, step: int = 0, last: Record | None = None) -> None:
        self.path = folder / FILE
        found = _parsed(folder)
        damaged = [number for number, record in enumerate(found, start=1) if record is None]
        if damaged:
            warn(f"{self.path}: {len(damaged)} of {len(found)} lines are damaged and removed, first line {damaged[0]}")
        kept = [record for record in found if record is not None and record["step"] <= step]
        if last is not None and not any(_same_place(record, last) for record in kept):
            warn(f"{self.path}: the record of step {last['step']} was lost and is added again; others may be lost too")
            kept = sorted([*kept, last], key=lambda record: record["step"])
        write_atomically(self.path, "".join(_line(record) for record in kept))
        self._events = _Events(folder / "events")
        for record in kept:
            self._events.add(record)
        self._file = open(self.path, "a")

    def append(self, record: Record) -> None:
        """Write a record to metrics.jsonl and to the events. Raise ``OSError`` if it cannot be written."""
        self._file.write(_line(record))
        self._file.flush()
        self._events.add(record)

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk, so that it holds all records before a later checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files. Errors of a full disk are ignored here: `append` has reported them."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._events.close()


class _Events:
    """A TensorBoard event file, written without the usual background thread, so that errors are raised at once."""

    def __init__(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        self._writer = RecordWriter(open(directory / f"events.out.tfevents.{time.time():.0f}", "wb"))
        self._write(Event(file_version="brain.Event:2"))

    def add(self, record: Record) -> None:
        self._write(_event(record))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def read_metrics(folder: Path) -> list[Record]:
    """Return the records of a run folder, without damaged or incomplete lines."""
    return [record for record in _parsed(folder) if record is not None]


def _parsed(folder: Path) -> list[Record | None]:
    """Return the record of each complete line of a run folder's metrics; None for a damaged line."""
    path = folder / FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_record(line) for line in lines if line.endswith(b"\n")]


def _record(line: bytes) -> Record | None:
    """Return the record in a line; None if it is not a record that `Metrics.append` could have written."""
    try:
        record = json.loads(line)
        if type(record["step"]) is not int or record["step"] < 0 or not isinstance(record["kind"], str):
            return None
        _line(record)
        _event(record)
        return record
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None


def _same_place(one: Record, other: Record) -> bool:
    return all(one[key] == other[key] for key in ("kind", "step"))


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _event(record: Record) -> Event:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(record)]
    return Event(step=record["step"], summary=Summary(value=values))


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record by their names: kind/name, and name/layer for those of a nested dict."""
    for name, value in record.items():
        if isinstance(value, dict):
            for layer, values in value.items():
                yield from ((f"{key}/{layer}", number) for key, number in values.items() if _is_number(number))
        elif name != "step" and _is_number(value):
            yield f"{record['kind']}/{name}", value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
