import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from str_triton.training.metrics import Metrics, read_metrics


def record(step: int) -> dict:
    layers = {"conv": {"sparsity": 0.5, "threshold": 0.01 * step}, "head": {"sparsity": 0.0, "threshold": None}}
    return {"kind": "epoch", "step": step, "loss": 1.0 / step, "layers": layers}


def events(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "events"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_records_stand_in_both_places(tmp_path: Path):
    metrics = Metrics(tmp_path)
    for step in (1, 2):
        metrics.append(record(step))
    metrics.close()
    assert read_metrics(tmp_path) == [record(1), record(2)]
    assert events(tmp_path, "epoch/loss") == [(1, 1.0), (2, 0.5)]
    assert events(tmp_path, "threshold/conv") == [(1, pytest.approx(0.01)), (2, pytest.approx(0.02))]


def test_a_resumed_run_leaves_nothing_twice(tmp_path: Path):
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3, 4):
        metrics.append(record(step))
    metrics.close()
    metrics = Metrics(tmp_path, step=2)
    for step in (3, 4):
        metrics.append(record(step))
    metrics.close()
    assert read_metrics(tmp_path) == [record(step) for step in (1, 2, 3, 4)]
    assert [step for step, _ in events(tmp_path, "epoch/loss")] == [1, 2, 3, 4]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path):
    metrics = Metrics(tmp_path)
    metrics.append(record(1))
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(2))[:20])
    metrics = Metrics(tmp_path, step=9)
    metrics.append(record(2))
    metrics.close()
    assert read_metrics(tmp_path) == [record(1), record(2)]


def test_not_a_number_is_refused(tmp_path: Path):
    metrics = Metrics(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.append({"kind": "epoch", "step": 1, "loss": float("nan")})
    metrics.close()
