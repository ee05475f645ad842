"""`python -m benchmarks.gpu` without a GPU: every part with tiny sizes, and what the command makes of them."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import time_loops
from benchmarks.gpu.__main__ import ROOT, in_process, main, run_parts
from benchmarks.gpu.gpu_tests import outcomes
from benchmarks.gpu.part import PARTS, Part, Session


def rehearse(name: str, folder: Path) -> dict:
    session = Session("cpu", folder, seconds=600)
    PARTS[name].run(session)
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(session.result))
    return session.result


def test_the_parts_take_less_than_eight_minutes():
    assert sum(part.seconds for part in PARTS.values()) <= 8 * 60
    assert next(iter(PARTS)) == "tests"


def test_tests_in_a_process_of_their_own(tmp_path):
    found = in_process(PARTS["tests"], "cpu", tmp_path)
    result = found["result"]
    assert found["state"] == "done"
    assert result["counts"] == {"passed": 1, "failed": 1}
    assert result["failed"] == ["test_rehearsal.py::test_x[0]"]
    assert any("assert 0" in line for line in result["end"])


def test_names_of_failures_in_output_that_is_cut_off():
    text = "a/b.py::test[1-x y] PASSED [ 1%]\na/b.py::test[2] FAILED [ 2%]\na/c.py::other ERROR\na/c.py::last"
    assert outcomes(text) == {
        "counts": {"passed": 1, "failed": 1, "error": 1},
        "failed": ["a/b.py::test[2]", "a/c.py::other"],
    }


def test_sanitizer(tmp_path):
    result = rehearse("sanitizer", tmp_path)
    assert result["executable"] == str(tmp_path / "compute-sanitizer")
    assert [result[tool]["status"] for tool in ("memcheck", "racecheck")] == [0, 0]
    assert any("1 passed" in line for line in result["memcheck"]["end"])


def test_solve(tmp_path):
    result = rehearse("solve", tmp_path)
    assert result["agrees_with_a_sort"]
    assert result["waits_for_the_device"] is False
    assert min(result[key] for key in ("solve_ms", "solve_host_ms", "select_ms", "select_gb_per_s")) > 0


def test_many_tensors(tmp_path):
    result = rehearse("many tensors", tmp_path)
    assert result["share_of_copy"].keys() == {"forward", "masked backward", "straight_through backward"}
    assert min(result[key] for key in ("copy_us", "forward_us", "eager_loop_ms", "eager_many_ms")) > 0


def test_time_loops(tmp_path):
    rows = rehearse("time loops", tmp_path)["rows"]
    assert [row["cell"] for row in rows] == ["gru", "lstm"]
    assert all(min(row[f"{name}_ms"] for name in ("layer", "kernels", "cudnn")) > 0 for row in rows)


def test_a_size_that_fails_does_not_hide_the_others(tmp_path, monkeypatch):
    def measure(size: time_loops.Size, session: Session) -> dict:
        if size.cell == "gru":
            raise RuntimeError("out of resources")
        return size._asdict()

    monkeypatch.setattr(time_loops, "measure", measure)
    with pytest.raises(SystemExit, match="gru"):
        rehearse("time loops", tmp_path)
    first, second = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert "out of resources" in first["error"]
    assert (second["cell"], "error" in second) == ("lstm", False)


@pytest.mark.parametrize("name", ["training step", "training step, compiled"])
def test_training_step(name, tmp_path):
    result = rehearse(name, tmp_path)
    assert result["ratio_to_dense"].keys() == result["ms"].keys() == {"dense", "str", "exact"}
    assert result["ratio_to_dense"]["dense"] == 1


def test_exactness(tmp_path):
    result = rehearse("exactness", tmp_path)
    assert len(result["cases"]) == 9
    assert result["exact"]
    assert result["same_bits"]


# ---- the command --------------------------------------------------------------------------------------------------


def interpreter(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a part's process run a script of the shell in place of Python."""
    stub = folder / "python"
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))


def test_what_a_stopped_part_had_reported_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.__main__.GRACE", 0)
    interpreter(tmp_path, "sleep 600", monkeypatch)
    (tmp_path / "result.json").write_text('{"a": 1}')
    found = in_process(Part("solve", "solve", 0), "cuda", tmp_path)
    assert (found["state"], found["result"]) == ("stopped after 0 s", {"a": 1})


def test_a_rehearsal_may_take_longer_than_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.__main__.GRACE", 0)
    interpreter(tmp_path, "exit 0", monkeypatch)
    assert in_process(Part("solve", "solve", 0), "cpu", tmp_path)["state"] == "done"
    monkeypatch.setitem(PARTS, "solve", Part("solve", "solve", 0))
    monkeypatch.setattr(Part, "run", lambda part, session: session.report(seconds=session.seconds_left()))
    monkeypatch.setattr(command, "end_with_parent", lambda: None)
    main(["--child", "solve", "--device", "cpu", "--folder", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text())["seconds"] > 60


@pytest.mark.parametrize("status", [0, 3])
def test_exit_status(status, tmp_path, monkeypatch):
    interpreter(tmp_path, f"exit {status}", monkeypatch)
    arguments = ["--device", "cpu", "--json", str(tmp_path / "gpu.json"), "--only", "solve", "exactness"]
    assert [main(arguments) for _ in range(2)] == [int(status > 0)] * 2


def test_a_part_that_fails_names_its_error(tmp_path, monkeypatch):
    interpreter(tmp_path, "echo no such card >&2; exit 3", monkeypatch)
    found = in_process(Part("solve", "solve", 600), "cpu", tmp_path)
    assert (found["state"], found["errors"]) == ("failed, exit status 3", ["no such card"])


def test_a_killed_command_takes_its_part_along():
    """SIGKILL leaves it no time for that. A process's output ends when nobody holds it any more."""
    script = "import subprocess as s; from benchmarks.gpu.watchdog import *; end_with_parent(); s.run(['sh', '-c', "
    script += "'echo runs; sleep 60'])"
    part = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert part.stdout.readline() == b"runs\n"
    assert part.communicate(timeout=20) == (b"", None)  # closes its input
    assert part.returncode == -signal.SIGKILL


def test_a_part_watches_the_command_that_has_started_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "end_with_parent", lambda: calls.append("watches"))
    monkeypatch.setitem(PARTS, "solve", SimpleNamespace(limit=lambda _: 1, run=lambda session: calls.append("runs")))
    assert main(["--child", "solve", "--device", "cpu", "--folder", str(tmp_path)]) == 0
    assert calls == ["watches", "runs"]
    interpreter(tmp_path, "[ -p /dev/stdin ]", monkeypatch)
    assert in_process(Part("solve", "solve", 600), "cpu", tmp_path)["state"] == "done"


def test_only_what_is_not_done_runs_again(tmp_path):
    path, ran, held = tmp_path / "gpu.json", [], []

    def run(part: Part, device: str, folder: Path) -> dict:
        assert folder.is_dir()
        held.append(json.loads(path.read_text())["parts"].keys())
        ran.append(part.name)
        return {"state": "done" if len(ran) != 2 else "failed, exit status 1", "seconds": 1, "result": {}}

    run_parts(["tests", "solve", "exactness"], path, "cpu", run)
    assert held == [set(), {"tests"}, {"tests", "solve"}]  # written after every part
    run_parts(list(PARTS), path, "cpu", run)
    assert ran[:4] == ["tests", "solve", "exactness", "sanitizer"]
    assert sorted(ran) == sorted([*PARTS, "solve"])
    record = json.loads(path.read_text())
    assert record["parts"].keys() == PARTS.keys()
    assert {"gpu", "driver", "torch", "triton"} <= record["machine"].keys()


def test_a_full_disk_loses_no_figures(tmp_path, monkeypatch):
    path, write, calls, full = tmp_path / "gpu.json", command.write_atomically, iter(range(9)), {1, 4}

    def write_if_there_is_room(path: Path, text: str) -> None:
        if next(calls) in full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    def run(part: Part, device: str, folder: Path) -> dict:
        return {"state": "done", "seconds": 1, "result": {"part": part.name}}

    monkeypatch.setattr(command, "write_atomically", write_if_there_is_room)
    whole = run_parts(["tests", "solve"], path, "cpu", run)  # no room after the first part alone
    assert json.loads(path.read_text()) == whole
    assert whole["parts"].keys() == {"tests", "solve"}
    with pytest.raises(OSError, match="No space left"):
        run_parts(["tests", "solve", "exactness"], path, "cpu", run)
    assert json.loads(path.read_text()) == whole


def test_bad_input_is_one_line(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text('{"machine": {"gpu": "another"}, "parts": {}}')
    cut_off = tmp_path / "cut_off.json"
    cut_off.write_text(path.read_text()[:20])
    for arguments, named in (
        (["--device", "cpu", "--json", str(path)], str(path)),
        (["--device", "cpu", "--json", str(cut_off)], str(cut_off)),
        (["--device", "cpu", "--json", str(tmp_path / "no folder" / "gpu.json")], "no folder"),
        (["--device", "cpu"], "--json"),
        (["--json", str(tmp_path / "x.json"), "--only", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
