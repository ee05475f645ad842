"""Mutation testing: change the code at one place at a time, and see whether a test fails.

    python -m benchmarks.studies.mutation str_triton/budget/select.py tests/budget/test_select.py [--limit N]

The first argument is the file to change, the others are its tests. The changes are made in a temporary copy of the
tracked files. A line per change is appended to benchmarks/results/mutation.jsonl; changes that it already holds are
skipped. A change that all tests pass "survived": either a test is missing, or the change does not matter. Each test run
is a fork of this process, which has imported torch already.
"""

import argparse
import ast
import copy
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.runs import RunFile
from benchmarks.timing import RESULTS

ROOT = Path(__file__).parents[2]
RUNS = RunFile(RESULTS / "mutation.jsonl", ("file", "line", "column", "change"))
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
    """Yield the nodes below a node. Annotations, decorators and the texts of errors are left out."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from targets(child)


def first_difference(old: str, new: str) -> str:
    """Return the first line that differs, before and after."""
    pairs = zip(old.splitlines(), [*new.splitlines(), ""], strict=False)
    return next(f"{a.strip()} -> {b.strip()}" for a, b in pairs if a != b)


def mutants(source: str) -> Iterator[Mutant]:
    """Yield the source with one change at a time."""
    tree = ast.parse(source)
    plain = ast.unparse(tree)
    for number, node in enumerate(targets(tree)):
        new = replacement(node)
        if new is None:
            continue
        changed = copy.deepcopy(tree)
        old = list(targets(changed))[number]
        for parent in ast.walk(changed):
            for field, value in ast.iter_fields(parent):
                if value is old:
                    setattr(parent, field, new)
                elif isinstance(value, list) and any(item is old for item in value):
                    setattr(parent, field, [new if item is old else item for item in value])
        text = ast.unparse(ast.fix_missing_locations(changed))
        if text != plain:
            yield Mutant(node.lineno, node.col_offset, first_difference(plain, text), text)


def outcome(root: Path, file: str, source: str, tests: list[str], seconds: int) -> str:
    """Run the tests in `root` on a changed file, in a fork. Return "killed", "survived" or "timeout"."""
    (root / file).write_text(source)
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        os.chdir(root)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.path.insert(0, str(root))
        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return "timeout"
    return "survived" if status == 0 else "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--limit", type=int, help="at most so many changes, spread over the file")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a run of the tests")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = (ROOT / options.file).read_text()
    found = list(mutants(source))
    chosen = found[:: max(1, -(-len(found) // options.limit))] if options.limit else found
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        if outcome(root, options.file, source, options.tests, options.seconds) != "survived":
            parser.error("the tests do not pass on the unchanged file, or they took too long")
        for mutant in chosen:
            run = {"file": options.file, **mutant._asdict()}
            text = run.pop("source")
            for missing in RUNS.missing([run]):
                result = outcome(root, options.file, text, options.tests, options.seconds)
                RUNS.append({**missing, "outcome": result})
                print(f"{result:9s} {options.file}:{mutant.line}: {mutant.change}", flush=True)
    mine = [run for run in RUNS.read() if run["file"] == options.file]
    survived = sum(run["outcome"] == "survived" for run in mine)
    print(f"{survived} of {len(mine)} changes survived")


if __name__ == "__main__":
    main()
