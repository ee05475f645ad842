"""`python -m benchmarks.speed.kernel_resources` goes on where it was killed. What it counts: tests/ops."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is for Linux")

from benchmarks.runs import RunFile
from benchmarks.speed import kernel_resources
from benchmarks.speed.kernel_launches import launches
from benchmarks.speed.kernel_resources import Resources, measure_all

KEY = ("code", "all", "target", "launch")


def run(target: str, launch: int, *hashes: str, code: str = "x") -> dict:
    kernels = [
        {"hash": name} | asdict(Resources(name, f"variant {launch}", target, 4, 20, 0, 0, 128, 128, 0, 0, 0, ""))
        for name in hashes
    ]
    named = dict(zip(KEY, (code, False, target, launch), strict=True))
    return named | {"variant": "v", "seconds": 1.0, "kernels": kernels}


def test_every_variant_includes_the_few() -> None:
    few, every = ([name for name, _ in launches(all_variants)] for all_variants in (False, True))
    assert len(every) > len(few)
    assert {*few} <= {*every}


def test_launches_that_do_not_compile_do_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(wanted: dict) -> dict:
        if wanted["launch"] == 1:
            raise TypeError("loop carried variable")
        return run(wanted["target"], wanted["launch"], "a")

    monkeypatch.setattr(kernel_resources, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(kernel_resources, "measure", measure)
    progress = RunFile(tmp_path / "a.json.partial.jsonl", KEY)
    wanted = [{"code": "x", "all": False, "target": "sm_90", "launch": launch} for launch in range(4)]
    with pytest.raises(SystemExit, match="launch 1 for sm_90: loop carried variable"):
        measure_all(wanted, progress)
    assert [held["launch"] for held in progress.read()] == [0, 2, 3]


def test_what_the_file_holds_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_resources, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("compiled again"))
    progress = RunFile(tmp_path / "a.json.partial.jsonl", KEY)
    held = [run("sm_90", 0, "a", "b"), run("sm_90", 1, "b", "c"), run("gfx942", 0, "a")]
    for one in [run("sm_90", 0, "old", code="y"), *held]:
        progress.append(one)
    rows = measure_all([{field: one[field] for field in KEY} for one in held], progress)
    assert [(row.target, row.kernel, row.variant) for row in rows] == [
        ("sm_90", "a", "variant 0"),
        ("sm_90", "b", "variant 0"),  # the same code in two launches: once
        ("sm_90", "c", "variant 1"),
        ("gfx942", "a", "variant 0"),
    ]
