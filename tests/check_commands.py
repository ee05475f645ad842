"""Run every command of the bash blocks in README and docs/: python tests/check_commands.py. Exit with 1 if one fails.

A command runs as it stands, in the root of the repository, unless a rule below names a cheaper stand-in for it. The
output says of each command what was run, and why where that is not the command itself.
"""

import functools
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from os import environ, pathsep
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("imagenet.md", "paper-checkpoints.md")  # need files that few have; tests/cnn makes such files up
DOCUMENTS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in ELSEWHERE)]
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"(?<![\w./-])(\w+:)?[A-Z]{3,}(?![\w./=-])")  # DIR, imagefolder:DIR; not PIP_ARGS=...
TIMEOUT = 600  # Seconds for one command; coreutils' timeout ends its children too.


class Check(NamedTuple):
    """The check of a command: what is run, the options that the output must name, and why another command is run."""

    command: str
    options: list[str]
    why: str


def commands(text: str) -> Iterator[str]:
    """Yield the commands in a text's bash blocks, one for each line. A backslash joins lines; comments are dropped."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                yield re.sub(r"\s+", " ", command)


def check_for(command: str) -> Check:
    """Return the check of a command: the command itself, or its stand-in."""
    if re.match(r"make (test|lint|docs)\b", command):
        return Check(command.replace("make", "make --dry-run", 1), [], ".ci/run runs it beforehand")
    if command.startswith("pip install"):
        return Check(command.replace("install", "install --dry-run", 1), [], "it is installed already")
    if command.startswith("sbatch "):
        return Check(command.replace("sbatch", "tests/slurm/sbatch", 1), [], "there is no SLURM here")
    if PLACEHOLDER.search(command):
        return Check(*help_of(command), "DIR and NAME stand for the reader's own data")
    if re.match(r"python -m benchmarks\.|tensorboard ", command):
        return Check(*help_of(command), "it takes long")
    return Check(command, [], "")


def help_of(command: str) -> tuple[str, list[str]]:
    """Return the command of the program's --help, and the options that its output must name."""
    export = r"(?:python -m str_triton\.[cr]nn\.export|str-triton export) \w+"  # each export has its own options
    program = re.match(rf"{export}|str-triton \S+|python (-m )?\S+|\S+", command)[0]
    return f"{program} --help", re.findall(r"(?<=\s)--?[a-z][\w-]*", command.removeprefix(program))


@functools.cache
def output_of(command: str) -> tuple[int, str]:
    """Return the exit code and the output."""
    path = pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    result = subprocess.run(
        ["timeout", str(TIMEOUT), "bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=environ | {"PATH": path, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


def run(check: Check) -> str:
    """Run a check and return what went wrong, or "" if nothing did."""
    code, output = output_of(check.command)
    if code == 124:
        return f"not finished after {TIMEOUT} s\n{output}"
    if code:
        return f"exit code {code}\n{output}"
    unknown = [option for option in check.options if not is_named(option, output)]
    return f"{check.command} does not name {', '.join(unknown)}\n{output}" if unknown else ""


def is_named(option: str, text: str) -> bool:
    """Return whether a help text names an option: as it is, or --json as --[no-]json."""
    pattern = option.replace("--", r"--(?:\[no-\])?", 1)
    return bool(re.search(rf"{pattern}(?![\w-])", text))


def main() -> int:
    """Check every command, in the documents' order and each once."""
    failures = 0
    for command in dict.fromkeys(commands("\n".join(document.read_text() for document in DOCUMENTS))):
        check = check_for(command)
        start = time.monotonic()
        problem = run(check)
        failures += bool(problem)
        instead = f"; run as `{check.command}`: {check.why}" if check.why else ""
        print(f"{'FAILED' if problem else 'ok'}: {command} ({time.monotonic() - start:.0f} s{instead})", flush=True)
        if problem:
            print(problem, flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
