"""`python -m benchmarks.gpu` without a GPU: every part with tiny sizes, and what the command makes of them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import time_loops
from benchmarks.gpu.__main__ import in_process, main, run_parts
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
    found = in_process(replace(PARTS["tests"], seconds=600), "cpu", tmp_path)
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
    found = in_process(Part("solve", "solve", 0), "cpu", tmp_path)
    assert (found["state"], found["result"]) == ("stopped after 0 s", {"a": 1})


def test_a_part_that_fails_names_its_error(tmp_path, monkeypatch):
    interpreter(tmp_path, "echo no such card >&2; exit 3", monkeypatch)
    found = in_process(Part("solve", "solve", 600), "cpu", tmp_path)
    assert (found["state"], found["errors"]) == ("failed, exit status 3", ["no such card"])


def test_only_what_is_not_done_runs_again(tmp_path):
    path, ran = tmp_path / "gpu.json", []

    def run(part: Part, device: str, folder: Path) -> dict:
        assert folder.is_dir()
        ran.append(part.name)
        assert path.exists() == (len(ran) > 1)  # written after every part
        return {"state": "done" if len(ran) != 2 else "failed, exit status 1", "seconds": 1, "result": {}}

    run_parts(["tests", "solve", "exactness"], path, "cpu", run)
    run_parts(list(PARTS), path, "cpu", run)
    assert ran[:4] == ["tests", "solve", "exactness", "sanitizer"]
    assert sorted(ran) == sorted([*PARTS, "solve"])
    record = json.loads(path.read_text())
    assert record["parts"].keys() == PARTS.keys()
    assert {"gpu", "driver", "torch", "triton"} <= record["machine"].keys()


def test_bad_input_is_one_line(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text('{"machine": {"gpu": "another"}, "parts": {}}')
    for arguments, named in (
        (["--device", "cpu", "--json", str(path)], str(path)),
        (["--device", "cpu"], "--json"),
        (["--json", str(tmp_path / "x.json"), "--only", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
