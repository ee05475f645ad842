"""Check types, as `make types` does: python .ci/check_types.py.

mypy may find errors only in the modules that pyproject.toml lists, and must find one in each of them, so that the list
shrinks. In user_program.py it must find errors on the lines marked "wrong" and on no other.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
USER = ".ci/user_program.py"
LISTED = "ignore_errors = true  # listed"  # the line in pyproject.toml that silences the listed modules
ERROR = re.compile(r"(\S+?\.py):(\d+): error: ")


class Error(NamedTuple):
    """An error that mypy has found, and its line of mypy's output."""

    path: str
    line: int
    text: str

    @property
    def module(self) -> str:
        """The module of the file: "a.b" for a/b.py and for a/b/__init__.py."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def main() -> None:
    """Exit with a message if a check fails."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = listed_modules(project)
    found = faults(errors(project.replace(LISTED, "")), listed, (ROOT / USER).read_text())
    if found:
        sys.exit("\n".join(found))
    print(f"types: no error outside of the {len(listed)} modules that pyproject.toml lists")


def listed_modules(project: str) -> set[str]:
    """Return the modules that pyproject.toml allows to have errors."""
    assert project.count(LISTED) == 1, f"pyproject.toml must have one line {LISTED!r}"
    overrides = tomllib.loads(project)["tool"]["mypy"]["overrides"]
    silenced = [set(entry["module"]) for entry in overrides if entry.get("ignore_errors")]
    (listed,) = (modules for modules in silenced if not any("*" in module for module in modules))
    return listed


def errors(settings: str) -> list[Error]:
    """Run mypy with the settings, the text of a pyproject.toml, on the package as it is installed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(settings)
        (folder / ".ci").symlink_to(ROOT / ".ci")
        (folder / "str_triton").mkdir()
        for path in (*(ROOT / "str_triton").iterdir(), ROOT / "cnn", ROOT / "rnn"):
            (folder / "str_triton" / path.name).symlink_to(path)
        options = ["--config-file", "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache", "--no-pretty"]
        command = [sys.executable, "-m", "mypy", *options, "str_triton", USER]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        sys.exit(result.stdout + result.stderr)
    matches = ((ERROR.match(line), line) for line in result.stdout.splitlines())
    return [Error(match[1], int(match[2]), line) for match, line in matches if match]


def faults(found: list[Error], listed: set[str], program: str) -> list[str]:
    """Return a line for each fault: errors elsewhere, and modules and lines of the user's program without one."""
    own = {error.line for error in found if error.path == USER}
    wrong = {number for number, line in enumerate(program.splitlines(), start=1) if line.endswith("# wrong")}
    lines = [error.text for error in found if error.path != USER and error.module not in listed]
    lines += [error.text for error in found if error.path == USER and error.line not in wrong]
    lines += [f"{USER}:{number}: mypy finds no error in a wrong line" for number in sorted(wrong - own)]
    clean = sorted(listed - {error.module for error in found})
    return lines + [f"pyproject.toml: {module} has no error left: remove it from the list" for module in clean]


if __name__ == "__main__":
    main()
