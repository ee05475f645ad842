import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from str_triton.training.errors import UserError
from str_triton.training.run_folder import RunFolder, default_run_dir

# Another run's use of the lock, without importing torch, to be quick.
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path: Path):
    """Start a process that holds the lock of the run folder tmp_path / "run"."""
    RunFolder.create(tmp_path / "run", {"config.json": "{}"}).close()
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run" / "lock"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_create_makes_the_folder_with_its_files(tmp_path: Path):
    with RunFolder.create(tmp_path / "a" / "run", {"config.json": "{}", "environment.json": "[]"}) as folder:
        assert folder.path == tmp_path / "a" / "run"
        assert folder.read("config.json") == "{}"
        assert names(folder.path) == ["config.json", "environment.json", "lock"]
    assert names(tmp_path / "a") == ["run"]


def test_create_takes_an_empty_folder(tmp_path: Path):
    (tmp_path / "run").mkdir()
    RunFolder.create(tmp_path / "run", {"config.json": "{}"}).close()
    assert names(tmp_path / "run") == ["config.json", "lock"]


@pytest.mark.parametrize("place", ["file", "file/run", "file/deeper/run"])
def test_create_below_a_file_is_refused(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"the run directory .*run|file cannot be made"):
        RunFolder.create(tmp_path / place, {"config.json": "{}"})
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_create_refuses_a_folder_with_a_run(tmp_path: Path):
    RunFolder.create(tmp_path / "run", {"config.json": "old"}).close()
    with pytest.raises(UserError, match=r"--resume.* --run-dir"):
        RunFolder.create(tmp_path / "run", {"config.json": "new"})
    assert (tmp_path / "run" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_create_refuses_a_folder_with_something_else(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="is not empty"):
        RunFolder.create(tmp_path, {"config.json": "{}"})
    assert names(tmp_path) == ["thesis.tex"]


def test_a_failed_create_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("str_triton.training.run_folder.write_atomically", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        RunFolder.create(tmp_path / "run", {"config.json": "{}"})
    assert names(tmp_path) == []


def test_a_folder_in_use_is_refused_until_its_process_is_killed(tmp_path: Path, other_run: subprocess.Popen):
    for take in (lambda path: RunFolder.create(path, {}), RunFolder.reopen):
        with pytest.raises(UserError, match=r"in use by another run \(process \d+\)"):
            take(tmp_path / "run")
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    RunFolder.reopen(tmp_path / "run").close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path):
    """Check the lock of a killed parent. Data workers may outlive it and inherit the open file."""
    folder = RunFolder.create(tmp_path / "run", {"config.json": "{}"})
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        folder.close()
        with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run" / "lock"], stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"held\n"
            other.kill()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_default_run_dirs_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        paths.append(default_run_dir("digits"))
        paths[-1].mkdir(parents=True)
    assert len(set(paths)) == 3
    assert all(path.parent == Path("runs") and path.name.startswith("digits-") for path in paths)


def test_a_directory_that_cannot_be_made_is_refused_before_it_is_tried(tmp_path: Path):
    RunFolder.check(tmp_path / "new" / "run", resume=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run .*Not a directory: .*file$"):
        RunFolder.check(tmp_path / "file" / "run", resume=False)
