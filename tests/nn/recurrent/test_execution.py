"""The choice between the op and torch's layer on the CPU: arithmetic, files, and the state that it leaves alone."""

import os
import threading
from pathlib import Path

import pytest
import torch

from str_triton.native.build import library
from str_triton.nn.recurrent import execution
from str_triton.nn.recurrent.execution import KINDS, NEVER, Sizes, Times, fastest
from str_triton.rnn.models import CELLS

LOOP, NATIVE, DENSE = (Times(*[1.0 if kind == best else 2.0 for kind in KINDS] * 2) for best in KINDS)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measure, and keep the times in an empty folder."""
    monkeypatch.setenv("STR_TRITON_MEASURE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    execution._times.cache_clear()
    yield tmp_path
    execution._times.cache_clear()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def use(monkeypatch: pytest.MonkeyPatch, *results: Times) -> list[Sizes]:
    """Return these times in turn in place of a measurement, and the list that the measured sizes are appended to."""
    asked, left = [], list(results)

    def measured(sizes: Sizes) -> Times:
        asked.append(sizes)
        return left.pop(0)

    monkeypatch.setattr(execution, "measured", measured)
    return asked


def test_preparing_the_matrix_counts_for_short_sequences() -> None:
    """Two seconds and 3 a step, against 12 seconds and 1 a step: equal at 5 steps."""
    short, long = execution.SHORT, execution.LONG
    times = Times(2.0 + 3.0 * short, NEVER, 12.0 + short, 2.0 + 3.0 * long, NEVER, 12.0 + long)
    assert [times.fastest(steps) for steps in (1, 5, 6, 100)] == ["loop", "loop", "dense", "dense"]


def test_near_sizes_share_a_measurement() -> None:
    threads = torch.get_num_threads()
    for given, near in (((64, 1, 1), (64, 4, 1)), ((64, 5, 3), (64, 8, 4)), ((64, 33, 100), (64, 48, 64)),
                        ((3, 1, 2), (3, 1, 2)), ((3, 3, 33), (3, 3, 64))):  # fmt: skip
        assert Sizes.near("gru", *given, True) == ("gru", *near, True, threads)


def test_times_are_kept_for_later_processes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = use(monkeypatch, DENSE)
    for _ in range(2):
        assert fastest("gru", 32, 4, 2, 9, training=True) == "dense"
        assert fastest("gru", 32, 3, 2, 5, training=True) == "dense"
        execution._times.cache_clear()  # another process
    assert len(asked) == len(files(cache)) == 1
    use(monkeypatch, LOOP)
    assert fastest("gru", 32, 4, 2, 9, training=False) == "loop"
    assert len(files(cache)) == 2


@pytest.mark.parametrize(
    "content", [b"", b"1 2 3", b"\xff\xfe", b"1.000e-03 " * 4, b"1.000e-03 " * 5 + b"-1.00e-03", b"x" * 1000]
)
def test_a_damaged_file_is_measured_again(content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, LOOP, DENSE)
    assert fastest("gru", 32, 4, 2, 9, training=True) == "loop"
    (path,) = files(cache)
    path.write_bytes(content)
    execution._times.cache_clear()
    assert fastest("gru", 32, 4, 2, 9, training=True) == "dense"
    execution._times.cache_clear()
    assert fastest("gru", 32, 4, 2, 9, training=True) == "dense"


def test_the_first_of_two_processes_decides(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(sizes: Sizes) -> Times:
        (folder,) = (cache / "str_triton").iterdir()
        name = "-".join(map(str, (*sizes[:4], "training", sizes.threads)))
        (folder / name).write_text(" ".join(f"{value:.3e}" for value in DENSE))  # The other one was faster.
        return LOOP

    monkeypatch.setattr(execution, "measured", measured)
    assert fastest("gru", 32, 4, 2, 9, training=True) == "dense"


def test_rules_decide_where_processes_must_agree(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_rules = [fastest("lstm", 2049, 8, 2, 9, training=True)]  # no measurement: there is none to give
    with monkeypatch.context() as patch:
        patch.setenv("STR_TRITON_MEASURE", "0")
        by_rules.append(fastest("lstm", 256, 8, 2, 9, training=True))
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        by_rules.append(fastest("lstm", 256, 8, 2, 9, training=True))
    torch.use_deterministic_algorithms(True)
    try:
        by_rules.append(fastest("lstm", 256, 8, 2, 9, training=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert by_rules == ["loop"] * 4
    assert not files(cache)
    use(monkeypatch, DENSE)
    assert fastest("lstm", 256, 8, 2, 9, training=True) == "dense"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files on this system")
def test_a_folder_that_others_can_write_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "str_triton").mkdir()
    (cache / "str_triton").chmod(0o777)
    asked = use(monkeypatch, DENSE)
    assert fastest("lstm", 256, 8, 2, 9, training=True) == "loop"
    assert (asked, files(cache)) == ([], [])


def test_a_measurement_that_fails_leaves_the_rules(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sizes: Sizes) -> Times:
        raise MemoryError

    monkeypatch.setattr(execution, "_measure", fail)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    assert fastest("lstm", 256, 8, 2, 9, training=True) == "loop"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_a_measurement_leaves_the_callers_state_alone(cell: str, training: bool) -> None:
    before = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        times = execution.measured(Sizes(cell, 8, 2, 3, training, 1))
    can_run = [True, library() is not None, CELLS[cell].has_dense] * 2
    assert [0 < value < 1 if can else value == NEVER for value, can in zip(times, can_run, strict=True)] == [True] * 6
    assert torch.equal(torch.get_rng_state(), before)


def test_a_measurement_uses_the_callers_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's number belongs to a thread: without setting it, the new thread would use all cores."""
    found: list[tuple[str, int]] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: found.append((threading.current_thread().name, count)))
    monkeypatch.setattr(execution, "_measure", lambda sizes: found.append((threading.current_thread().name, 3)) or LOOP)
    execution.measured(Sizes("gru", 8, 2, 3, True, 3))
    assert found[0] == found[1] != (threading.current_thread().name, 3)


@pytest.mark.parametrize("cell", CELLS.values())
def test_a_layer_follows_the_times(cell: type, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, outputs = cell(5, 8, max_rank=4), torch.randn(6, 3, 5), []
    ran: list[tuple[str, bool]] = []
    for name in ("_dense_layer", "_low_rank_layer"):
        own = getattr(layer, name)

        def spy(*args, name=name, own=own, native=False, **options):
            ran.append((name, native))
            return own(*args, **({"native": native} if name == "_low_rank_layer" else {}))

        monkeypatch.setattr(layer, name, spy)
    for times in (LOOP, NATIVE, DENSE)[: 3 if layer.has_dense else 2]:
        use(monkeypatch, times, times)
        execution._times.cache_clear()
        for path in files(cache):
            path.unlink()
        outputs.append(layer(x)[0])
    assert ran == [("_low_rank_layer", False), ("_low_rank_layer", True), ("_dense_layer", False)][: len(outputs)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
