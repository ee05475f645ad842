"""`pytest -m gpu`, without -x: how many tests pass, and the names of those that do not."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Session

ROOT = Path(__file__).parents[2]
OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
# A rehearsal's tests: no repository, no torch.
REHEARSAL = "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('x', [1, 0])\ndef test_x(x):\n    assert x\n"
REHEARSAL_SETTINGS = "[pytest]\nmarkers = gpu: needs a GPU\n"


def run(session: Session) -> None:
    command, folder = pytest(session)
    with (session.folder / "pytest.txt").open("w+") as output:
        try:
            status = subprocess.run(
                [*command, "-v"], cwd=folder, stdout=output, stderr=subprocess.STDOUT, timeout=session.seconds_left()
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        output.seek(0)
        text = output.read()
    # The report of each failure begins after the last outcome.
    session.report(**outcomes(text), end=text.splitlines()[-60:] if status else [])
    if status is None:
        raise SystemExit("the tests took too long: see what has passed and what has failed")


def pytest(session: Session) -> tuple[list[str], Path]:
    """Return the command that runs the tests marked `gpu`, and the folder to run it in."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    if session.device == "cuda":
        return command, ROOT
    (session.folder / "test_rehearsal.py").write_text(REHEARSAL)
    (session.folder / "pytest.ini").write_text(REHEARSAL_SETTINGS)
    return command, session.folder


def outcomes(text: str) -> dict[str, Any]:
    """Return the number of tests by outcome and the names of failures from pytest's -v output, even a cut one."""
    found = OUTCOME.findall(text)
    counts = Counter(outcome.lower() for _, outcome in found)
    return {"counts": dict(counts), "failed": [name for name, outcome in found if outcome in ("FAILED", "ERROR")]}
