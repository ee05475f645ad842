"""The base of the studies of cnn/train.py on real images: lines of methods, resumable runs, and held-out images."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.runs import Run
from str_triton import Budget
from str_triton.cnn import train

THROUGHOUT = "str-exact, straight-through"  # the gradient that trains pruned weights too, for the whole run
METHODS: dict[str, list[str]] = {
    "dense": ["--method", "dense"],
    "str-exact": ["--method", "str-exact"],
    "gmp, global": ["--method", "gmp", "--distribution", "global"],
    "str-exact, FLOP-aware": ["--method", "str-exact", "--distribution", "flop-aware"],
    "str-exact, learned": ["--method", "str-exact", "--distribution", "learned"],
    "gmp, ERK": ["--method", "gmp", "--distribution", "erk"],
    "rigl, ERK": ["--method", "rigl", "--distribution", "erk"],
    "dnw, ERK": ["--method", "dnw", "--distribution", "erk"],
    THROUGHOUT: ["--method", "str-exact", "--gradient", "straight_through"],
}


def finished(folder: Path, options: list[str]) -> Run:
    """Run or resume the training program in `folder`, and return the results.

    Raises RuntimeError if the program ends with an error.
    """
    if not (folder / "summary.json").exists():
        resumable = any((folder / "checkpoints").glob("*"))
        if not resumable:
            shutil.rmtree(folder, ignore_errors=True)
        code = train.main([*(["--resume"] if resumable else options), "--run-dir", str(folder)])
        if code:
            raise RuntimeError(f"the run in {folder} ended with exit code {code}")
    summary = json.loads((folder / "summary.json").read_text())
    budget = Budget.from_json(folder / "budget.json")
    return {
        "accuracy": summary["accuracy"],
        "sparsity": budget.sparsity,
        "flops": budget.flops / budget.dense_flops,
        "density": {row.name: row.nonzeros / row.params for row in budget.covered_rows},
        "epochs": summary["epochs"],
        "seconds": summary["seconds"],
    }


def write_budget(path: Path, runs: list[Run], source: Run) -> None:
    """Write the layers' sparsities of the one of `runs` that has the fields of `source`, as a file for --budget.

    Raises ValueError if there is no such run.
    """
    found = [run for run in runs if source.items() <= run.items()]
    if not found:
        raise ValueError(f"the run {source} must come first, because another takes its budget")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: 100 * (1 - share) for name, share in found[0]["density"].items()}))


@contextmanager
def without_test_images(data: str) -> Iterator[str]:
    """Yield data like `data`, hub:DIR, without its test images: the program then holds out a fifth of each class."""
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(data.removeprefix("hub:")).glob("**/train*.parquet"):
            (Path(folder) / file.name).symlink_to(file.resolve())
        yield f"hub:{folder}"
