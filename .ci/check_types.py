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

ROOT = Path(__file__).parents[1]
USER = ".ci/user_program.py"
LISTED = "ignore_errors = true  # listed"  # the line in pyproject.toml that silences the listed modules
ERROR = re.compile(r"(\S+?\.py):(\d+): error: .*")


def main() -> None:
    """Exit with a message if a check fails."""
    project = (ROOT / "pyproject.toml").read_text()
    assert project.count(LISTED) == 1, f"pyproject.toml must have one line {LISTED!r}"
    silenced = [entry for entry in tomllib.loads(project)["tool"]["mypy"]["overrides"] if entry.get("ignore_errors")]
    (listed,) = (set(entry["module"]) for entry in silenced if not any("*" in name for name in entry["module"]))
    errors = found(project.replace(LISTED, ""))
    wrong = [error for error in errors if error[1] != USER and module_of(error[1]) not in listed]
    lines = (ROOT / USER).read_text().splitlines()
    marked = {number for number, line in enumerate(lines, start=1) if line.endswith("# wrong")}
    wrong += [error for error in errors if error[1] == USER and int(error[2]) not in marked]
    messages = [error[0] for error in wrong]
    for number in sorted(marked - {int(error[2]) for error in errors if error[1] == USER}):
        messages.append(f"{USER}:{number}: mypy finds no error in this wrong line")
    for module in sorted(listed - {module_of(error[1]) for error in errors}):
        messages.append(f"pyproject.toml: {module} has no error left: remove it from the list")
    if messages:
        sys.exit("\n".join(messages))
    print(f"types: no error outside of the {len(listed)} modules that pyproject.toml lists")


def found(settings: str) -> list[re.Match[str]]:
    """Return mypy's errors under the settings, the text of a pyproject.toml."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "pyproject.toml")
        config.write_text(settings)
        command = [sys.executable, "-m", "mypy", "--config-file", config, "--no-pretty", "str_triton", USER]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        sys.exit(result.stdout + result.stderr)
    return [match for line in result.stdout.splitlines() if (match := ERROR.match(line))]


def module_of(path: str) -> str:
    """Return the module in a file: "a.b" for a/b.py and for a/b/__init__.py."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


if __name__ == "__main__":
    main()
