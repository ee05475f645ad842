"""The names of programs as they were typed, missing extras, and readers of the output that leave."""

import io
import json
import os
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import str_triton
from str_triton import __main__, programs
from str_triton.programs import command, output_is_closed, recipes_elsewhere, trained_by
from tests.messages import holds

ROOT = Path(__file__).parents[1]


def start(monkeypatch: pytest.MonkeyPatch, *words: str, script: str) -> None:
    """Make this process look like one that was started as `python WORDS` with the file ``script``."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", *words])
    monkeypatch.setattr(sys, "argv", [script, *words[2 if words[0] == "-m" else 1 :]])


@pytest.mark.parametrize(
    ("words", "script", "training", "export"),
    [
        (["/bin/str-triton", "train-cnn"], "/bin/str-triton", "str-triton train-cnn", "str-triton export"),
        (["-m", "str_triton", "x"], "/s.py", "python -m str_triton train-cnn", "python -m str_triton export"),
        (
            ["-m", "str_triton.cnn.train", "-m", "x"],
            "/s/cnn/train.py",
            "python -m str_triton.cnn.train",
            "python -m str_triton.cnn.export",
        ),
        (["/s/cnn/train.py"], "/s/cnn/train.py", "python /s/cnn/train.py", "python -m str_triton.cnn.export"),
        (["-m", "pytest"], "/s/pytest.py", "python cnn/train.py", "python -m str_triton.cnn.export"),
    ],
)
def test_programs_are_named_as_they_were_typed(
    monkeypatch: pytest.MonkeyPatch, words: list[str], script: str, training: str, export: str
):
    start(monkeypatch, *words, script=script)
    assert command("train-cnn") == training
    assert command("export-cnn") == export


@pytest.mark.parametrize(
    ("config", "program"),
    [({"cell": "gru"}, "train-rnn"), ({"model": "resnet20"}, "train-cnn"), ({}, None), ([], None)],
)
def test_a_run_tells_its_program(tmp_path: Path, config: object, program: str | None):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert trained_by(tmp_path) == program
    expected = "export-rnn" if program == "train-rnn" else "export-cnn"
    assert __main__.export_program(["pack", "--values", "float16", str(tmp_path), "out"]) == expected


@pytest.mark.parametrize("words", [[], *([name] for name in programs.PROGRAMS), ["pack"]], ids=str)
def test_every_program_has_a_version_and_suggests_it(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert ended(*words, "--verson") == 2
    assert "did you mean --version" in capsys.readouterr().err
    assert ended(*words, "--version") == 0
    assert str_triton.__version__ in capsys.readouterr().out


def ended(*words: str) -> int:
    """Return the exit code of a program."""
    try:
        if words[0] in programs.PROGRAMS:
            return import_module(programs.PROGRAMS[words[0]].module).main(list(words[1:]))
        return __main__.main(words)
    except SystemExit as end:
        return int(end.code or 0)


def test_a_folder_without_a_run_tells_nothing(tmp_path: Path):
    assert trained_by(tmp_path) is trained_by(tmp_path / "none") is None
    exports = [__main__.export_program([target, "x"]) for target in ("c", "sparse", "pack")]
    assert exports == ["export-rnn", "export-cnn", "export-cnn"]


@pytest.mark.parametrize(
    ("config", "target", "right"), [({"model": "resnet20"}, "c", "sparse"), ({"cell": "gru"}, "sparse", "c")]
)
def test_a_target_of_other_runs_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, str], target: str, right: str
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert __main__.main(["export", target, str(tmp_path), "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path} is a run of ")
    assert line.endswith(f"export it as pack, onnx or {right}")
    program = {"sparse": "export-cnn", "c": "export-rnn"}[right]
    assert __main__.export_program([right, str(tmp_path), "out"]) == program


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(programs.EXTRAS, "train", ("json", "no_such_package"))
    start(monkeypatch, "-m", "str_triton.cnn.train", script="-m")
    with pytest.raises(SystemExit) as leaving:
        programs.check_started_program()
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: python -m str_triton.cnn.train needs the extra train (no_such_package)")
    assert "str-triton[train]" in error
    assert error.count("\n") == 1
    start(monkeypatch, "-m", "their.program", script="-m")
    programs.check_started_program()


@pytest.mark.parametrize("write", ["print", "ProgressBar(9).console.print"])
def test_a_reader_that_leaves_ends_the_program_quietly(write: str):
    """As `| head` does. The reader closes its end before the program has written anything."""
    code = f"""
import sys
from str_triton.training.errors import as_user_error, run_program
from str_triton.training.progress import ProgressBar

def program():
    sys.stdin.readline()
    with as_user_error(OSError):
        for _ in range(100_000):
            {write}("line")

sys.exit(run_program(program))
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


HELPS = ("--help", "pack --help", "train-cnn --help")
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, a device that is always full")

# The reader of a pipe closes its end before the program writes.
FRONT = """
import json, os, runpy, sys
import str_triton.cnn.train  # which takes seconds

codes = []
for number, (output, words) in enumerate(json.loads(sys.argv[1])):
    if (child := os.fork()) == 0:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(os.open(output, os.O_WRONLY) if output else writer, 1)
        os.dup2(os.open(f"{sys.argv[2]}/{number}", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv, sys.orig_argv = ["-m", *words.split()], ["python", "-m", "str_triton", *words.split()]
        runpy.run_module("str_triton", run_name="__main__", alter_sys=True)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module", params=["", "1"], ids=["buffered", "unbuffered"])
def helped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Run the front for each output and help, and return exit codes and errors. The programs share one import."""
    cases, folder = list(product(["", str(FULL)] if FULL.exists() else [""], HELPS)), tmp_path_factory.mktemp("errors")
    process = subprocess.run(
        [sys.executable, "-c", FRONT, json.dumps(cases), folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": request.param},
        stdout=subprocess.PIPE,
        timeout=300,
    )
    ends = enumerate(json.loads(process.stdout))
    return {case: (code, (folder / str(i)).read_text()) for case, (i, code) in zip(cases, ends, strict=True)}


@pytest.mark.parametrize("words", HELPS)
def test_help_that_nobody_reads_ends_quietly(helped: dict[tuple[str, str], Any], words: str):
    assert helped["", words] == (141, "")


@needs_full
@pytest.mark.parametrize("words", HELPS)
def test_help_on_a_full_disk_is_one_line(helped: dict[tuple[str, str], Any], words: str):
    code, error = helped[str(FULL), words]
    assert code == 2
    assert holds(error, "error: .. standard output .. No space left on device")
    assert error.count("\n") == 1


@needs_full
def test_a_fault_on_a_full_disk_keeps_its_code():
    """Neither the message nor the rest of the output can be written."""
    code = """
from str_triton.training.errors import as_user_error, run_program

def program():
    print("before")
    with as_user_error(ValueError):
        raise ValueError("the fault")

raise SystemExit(run_program(program))
"""
    with open("/dev/full", "wb", buffering=0) as full:
        process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=full, timeout=60)
    assert process.returncode == 2


def test_help_without_standard_output_ends_quietly():
    process = subprocess.run(
        ["sh", "-c", '"$0" -m str_triton --help >&-', sys.executable], cwd=ROOT, stderr=subprocess.PIPE, timeout=60
    )
    assert (process.returncode, process.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("name", "program", "line"),
    [
        ("cifar10", "train-rnn", "python cnn/train.py cifar10"),
        ("har6-gru", "train-cnn", "python rnn/train.py har6-gru"),
        ("har7-gru", "train-cnn", "python rnn/train.py has har6-gru"),
        ("cifar10", "train-cnn", ""),
        ("nothing-like-it", "train-cnn", ""),
    ],
)
def test_recipes_of_another_program(monkeypatch: pytest.MonkeyPatch, name: str, program: str, line: str):
    start(monkeypatch, "-m", "pytest", script="/s/pytest.py")
    assert line in (recipes_elsewhere(name, program) or "")
    assert bool(line) == (recipes_elsewhere(name, program) is not None)


def test_a_package_without_its_programs_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As in a clone's root with another copy installed: Python takes the clone's str_triton, without cnn and rnn."""
    monkeypatch.setitem(programs.PROGRAMS, "train-cnn", programs.Program("str_triton.nowhere.train", ""))
    assert __main__.main(["train-cnn"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert holds(line, f"error: .. str_triton.nowhere .. pip install -e {ROOT} .. str-triton")


def test_output_that_is_no_pipe_is_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not output_is_closed()
