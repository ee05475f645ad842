"""Mutation testing: change the code at one place at a time, and see whether a test fails.

    make coverage COVERAGE_CONTEXT=test_function
    python -m benchmarks.studies.mutation str_triton/ops str_triton/budget --tests tests/ops tests/budget \
        tests/interpreter [--sample 400] [--seed 0] [--again] [--also TESTS]

The changes are made in a temporary copy of the tracked files. For each change, the tests run that reach its line
according to `.coverage`. A line per change is appended to benchmarks/results/mutation.jsonl; changes that it already
holds are skipped, so a sample continues where it ended. A change that all its tests pass "survived": either a test is
missing, or the change does not matter. Each test run is a fork of this process, which has imported torch already. At
the end, the tests that failed run without a change.

A change is looked at twice: `--again` runs the changes that no test noticed once more, after the tests were extended,
and appends a second line for each. The last line of a change counts. Its outcome is "gone" if the code is no longer
there. For a change that does not matter, append its line with a `reason`: `--again` leaves it out from then on.
"""

import argparse
import ast
import contextlib
import copy
import datetime
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from coverage import CoverageData

from benchmarks.runs import Run, RunFile
from benchmarks.timing import RESULTS

ROOT = Path(__file__).parents[2]
RUNS = RunFile(RESULTS / "mutation.jsonl", ("file", "column", "change"))  # Lines move.
INTERPRETER = "tests/interpreter/"  # needs TRITON_INTERPRET=1, which the other tests must not have
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Pow: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Mutant(NamedTuple):
    """A changed source, and where and how it differs."""

    line: int
    column: int
    change: str
    source: str


def replacement(node: ast.AST) -> ast.AST | None:
    """Return a changed copy of a node; None if the node is of no kind that is changed."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[operator, *_]) if type(operator) in OPERATORS:
            new.ops[0] = OPERATORS[type(operator)]()
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in OPERATORS:
            new.op = OPERATORS[type(operator)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            return new.operand
        case ast.Constant(value=bool()):
            new.value = not new.value
        case ast.Constant(value=int() | float()):
            new.value += 1
        case ast.IfExp() | ast.If() | ast.While():
            new.test = ast.UnaryOp(ast.Not(), new.test)
        case ast.Expr(value=ast.Call()):
            return ast.copy_location(ast.Pass(), new)
        case _:
            return None
    return new


def targets(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a node. Annotations, decorators, the texts of errors and zip's `strict` are left out."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise):
            continue
        if isinstance(node, ast.keyword) and node.arg == "strict":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from targets(child)


def first_difference(old: str, new: str) -> str:
    """Return the first line that differs, before and after."""
    pairs = zip(old.splitlines(), [*new.splitlines(), ""], strict=False)
    return next(f"{a.strip()} -> {b.strip()}" for a, b in pairs if a != b)


def places(source: str) -> list[int]:
    """Return the numbers, in the order of `targets`, of the nodes that can be changed."""
    return [number for number, node in enumerate(targets(ast.parse(source))) if replacement(node) is not None]


def mutant(source: str, number: int) -> Mutant | None:
    """Return the source with a change of one node; None if the node's code remains the same."""
    tree = ast.parse(source)
    plain = ast.unparse(tree)
    old = list(targets(tree))[number]
    new = replacement(old)
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list) and any(item is old for item in value):
                setattr(parent, field, [new if item is old else item for item in value])
    text = ast.unparse(ast.fix_missing_locations(tree))
    return None if text == plain else Mutant(old.lineno, old.col_offset, first_difference(plain, text), text)


def statement_lines(source: str, line: int) -> range:
    """Return the lines from the beginning of the innermost statement at a line to this line."""
    statements = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt))
    return range(max(node.lineno for node in statements if node.lineno <= line <= node.end_lineno), line + 1)


def reaching_tests(contexts: dict[int, list[str]], lines: Sequence[int], places: Sequence[str], stem: str) -> list[str]:
    """Return the tests in `places` that reach one of the lines, as pytest names them, the tests of file `stem` first.

    A line that runs during the import belongs to all tests that reach the file. contexts: by line, the names of test
    functions as coverage writes them; "" outside tests.
    """

    def of(chosen: Iterable[int]) -> set[str]:
        names = {name.rpartition(".") for line in chosen for name in contexts.get(line, ()) if "." in name}
        return {f"{module.replace('.', '/')}.py::{test}" for module, _, test in names}

    found = of(lines)
    if not found and any("" in contexts.get(line, ()) for line in lines):
        found = of(contexts)
    own = f"/test_{stem}.py"
    return sorted((name for name in found if name.startswith(tuple(places))), key=lambda name: (own not in name, name))


class Outcome(NamedTuple):
    """Return the verdict on a changed file, "killed", "survived" or "timeout", and the first test that failed."""

    outcome: str
    by: str | None = None


def outcome(root: Path, tests: list[str], seconds: int) -> Outcome:
    """Run tests of the copy in `root`, those of the interpreter in a process of their own, until one fails."""
    interpreted = [name for name in tests if name.startswith(INTERPRETER)]
    for own in ([name for name in tests if name not in interpreted], interpreted):
        if not own:
            continue
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            signal.alarm(seconds)
            os.chdir(root)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            sys.path.insert(0, str(root))
            if own is interpreted:
                os.environ["TRITON_INTERPRET"] = "1"
            options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
            os._exit(int(pytest.main([*options, *own], plugins=[FirstFailure(writing)])))
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # processes that a test has left
        os.close(writing)
        with open(reading) as pipe:
            failed = pipe.readline().strip()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            return Outcome("timeout")
        if status:
            return Outcome("killed", failed or None)
    return Outcome("survived")


class FirstFailure:
    """A pytest plugin that writes the names of failing tests, and of files that cannot be imported, to a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self.pipe, f"{report.nodeid}\n".encode())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            os.write(self.pipe, f"{report.nodeid}\n".encode())


def identity(run: Run) -> tuple:
    """Return what identifies a change in the results."""
    return tuple(run[field] for field in RUNS.key)


def last_runs(runs: Iterable[Run]) -> dict[tuple, Run]:
    """Return the last run of each change."""
    return {identity(run): run for run in runs}


def unnoticed(runs: Iterable[Run]) -> dict[tuple, Run]:
    """Return the last run of each change that no test has noticed and that nobody has given a reason for."""
    last = last_runs(runs).items()
    return {key: run for key, run in last if run["outcome"] in ("survived", "timeout") and "reason" not in run}


def changes_again(files: dict[str, str]) -> list[tuple[str, Mutant]]:
    """Return the changes of these files to look at again, and record those whose code is gone."""
    pending = {key: run for key, run in unnoticed(RUNS.read()).items() if run["file"] in files}
    possible = {}
    for file in {run["file"] for run in pending.values()}:
        changes = filter(None, (mutant(files[file], number) for number in places(files[file])))
        possible |= {identity({"file": file, **change._asdict()}): (file, change) for change in changes}
    for run in (run for key, run in pending.items() if key not in possible):
        RUNS.append({**run, "outcome": "gone", "date": today()})
    return [possible[key] for key in pending if key in possible]


def python_files(places: Sequence[str]) -> list[str]:
    """Return the Python files that are named, and those in the folders that are named, relative to the root."""
    found = [p for place in places for p in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def today() -> str:
    return datetime.date.today().isoformat()


def copy_tracked_files(root: Path) -> None:
    """Copy the files that git tracks."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="FILE", help="files or folders to change")
    parser.add_argument("--tests", nargs="+", required=True, help="test files or folders")
    parser.add_argument("--also", nargs="+", default=[], help="tests for every change, such as those in processes")
    parser.add_argument("--sample", type=int, help="so many changes, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="instead, the changes that no test has noticed so far")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a run of the tests")
    options = parser.parse_args()
    data = CoverageData(ROOT / ".coverage")
    data.read()
    torch.set_num_threads(1)
    files = {file: (ROOT / file).read_text() for file in python_files(options.places)}
    found = [(file, number) for file, source in files.items() for number in places(source)]
    random.Random(options.seed).shuffle(found)
    if options.again:
        chosen = changes_again(files)
    else:
        changed = ((file, mutant(files[file], number)) for file, number in found[: options.sample])
        chosen = [(file, change) for file, change in changed if change is not None]
    print(f"{len(chosen)} of {len(found)} changes in {len(files)} files", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_tracked_files(root)
        for file, change in chosen:
            run = {"file": file, **change._asdict()}
            text = run.pop("source")
            for missing in [run] if options.again else RUNS.missing([run]):
                lines = statement_lines(files[file], change.line)
                contexts = data.contexts_by_lineno(str(ROOT / file))
                tests = reaching_tests(contexts, lines, options.tests, Path(file).stem) + options.also
                (root / file).write_text(text)
                result = outcome(root, tests, options.seconds) if tests else Outcome("survived")
                (root / file).write_text(files[file])
                RUNS.append({**missing, "tests": len(tests), **result._asdict(), "date": today()})
                print(f"{result.outcome:9s} {file}:{change.line}: {change.change}", flush=True)
        keys = {identity({"file": file, **change._asdict()}) for file, change in chosen}
        mine = [run for key, run in last_runs(RUNS.read()).items() if key in keys]
        failing = sorted({run["by"] for run in mine if run["by"]})
        unchanged = outcome(root, failing, 3600) if failing else Outcome("survived")
    for name, runs in ("these", mine), ("all", list(last_runs(RUNS.read()).values())):
        counts = Counter(run["outcome"] for run in runs)
        print(f"of {name} {len(runs)} changes, {counts['survived']} survived and {counts['timeout']} took too long")
    if unchanged.outcome != "survived":
        parser.exit(1, f"{unchanged.by} fails without a change: what it has killed says nothing\n")


if __name__ == "__main__":
    main()
