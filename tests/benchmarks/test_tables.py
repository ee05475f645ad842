"""The tables of the studies on real data: left out without runs, right with some, whatever is still missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables import documents, photographs, ranks, real_data

Run = dict[str, Any]
SECTIONS: dict[str, Callable[[], str]] = {
    "caltech": photographs.caltech,
    "cifar": photographs.cifar,
    "speech_ranks": ranks.speech_ranks,
    "har_ranks": ranks.har_ranks,
    "har_six": ranks.har_six,
}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, photographs, real_data):
        monkeypatch.setattr(module, "RESULTS", tmp_path)


def photograph(line: str, target: Any, seed: int, accuracy: float, **more: Any) -> Run:
    sparsity = float(target) if target and "flops" not in str(target) else 0.0
    figures = {"accuracy": accuracy, "sparsity": sparsity, "flops": 1 - sparsity, "epochs": 5, "seconds": 600.0}
    return {"line": line, "target": target, "seed": seed, "lr": 0.02, **figures, **more}


def sequence(data: str, method: str, seed: int, accuracy: float, rate: float = 0.01, **job: Any) -> Run:
    own = {"data": data, "method": method, "seed": seed, "rate": rate, "epochs": 60, "ranks": None} | job
    sizes = {"params": 2000, "dense_params": 7000, "multiply_adds": 1900, "int8_weight_bytes": 2100}
    return {
        "job": own,
        "accuracy": accuracy,
        "validation_accuracy": accuracy - 0.01,
        "ranks": {"w": 8, "u": 7},
        **sizes,
    }


CALTECH = [
    photograph("dense", "", 0, 0.90),
    photograph("str-exact", "0.9", 0, 0.85),
    photograph("gmp, global", "0.9", 0, 0.84),
    photograph("str-exact, FLOP-aware", "0.3333 flops", 0, 0.88, flops=0.3333),
    photograph("str-exact", "0.9", 1, 0.87),
    photograph("str-exact, teacher", "0.9", 0, 0.89),
    photograph("str-exact, teacher, 16 epochs", "0.9", 0, 0.91, epochs=16),
]
CIFAR = [photograph(*run, model="resnet20") for run in (("str-exact", 0.9, 0, 0.8), ("dense", 0.0, 0, 0.9))]
SPEECH = [
    sequence("speech5", "str-exact", 0, 0.80, cell="gru", compression=3.0),
    sequence("speech5", "dense", 0, 0.82, cell="gru", compression=None),
    sequence("speech5", "fixed", 0, 0.79, cell="gru", compression=3.0),
]
HAR = [
    sequence("har2", "str-exact", 0, 0.92, ranks="9,8"),
    sequence("har2", "fixed", 0, 0.91, ranks="9,8"),
    sequence("har6", "dense", 0, 0.90, cell="lstm", compression=None),
    sequence("har2", "dense", 0, 0.93),
]


def write(folder: Path, name: str, runs: list[Run]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))


def cells(text: str, name: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip().replace("\N{NO-BREAK SPACE}", " ") for cell in row.strip("|").split("|")]


def test_what_has_no_runs_is_left_out() -> None:
    tables = {"real-data": real_data.real_data, **SECTIONS}
    text = "".join(f"<!-- table:{name.replace('_', '-')} -->\nold\n<!-- /table -->\n" for name in tables)
    filled = documents.fill(text, {name.replace("_", "-"): make for name, make in tables.items()})
    assert filled == text.replace("old\n", "")


@pytest.mark.parametrize(
    ("name", "file", "runs"),
    [
        ("caltech", "caltech", CALTECH),
        ("cifar", "cifar", CIFAR),
        ("speech_ranks", "speech_ranks", SPEECH),
        ("har_ranks", "har_ranks", HAR[:2]),
        ("har_six", "har_ranks", HAR[2:3]),
    ],
)
def test_a_section_grows_with_its_runs(name: str, file: str, runs: list[Run], tmp_path: Path) -> None:
    for number in range(1, len(runs) + 1):
        write(tmp_path, file, runs[:number])
        text = SECTIONS[name]()
        heading, table = text.splitlines()[0], [line for line in text.splitlines() if line.startswith("|")]
        assert heading.startswith("### ")
        assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
        assert len({line.count("|") for line in table}) == 1
        assert "one seed" in text


def test_caltech_shows_accuracy_megabytes_and_milliseconds(tmp_path: Path) -> None:
    write(tmp_path, "caltech", CALTECH)
    assert cells(photographs.caltech(), "str-exact")[4:6] == ["not measured"] * 2
    deploy = {"threads": 2, "bytes_float16": 1e6, "dense_ms": 9.0, "machine": {"processor": "P"}}
    write(
        tmp_path,
        "caltech_deploy",
        [
            {"line": "dense", "target": "", "bytes": 13e6, "ms": 8.0, **deploy},
            {"line": "str-exact", "target": "0.9", "bytes": 1.9e6, "ms": 4.5, **deploy},
            {"line": "str-exact", "target": "0.9", "bytes": 1.9e6, "ms": 7.5, **deploy, "threads": 1},
        ],
    )
    text = photographs.caltech()
    assert cells(text, "str-exact") == [
        *("str-exact", "90.00", "86.00 ± 1.41", "-4.00", "1.90 (1.00)", "4.50 (2.00x)", "10.00 ± 0.00", "0.02", "2"),
    ]  # fmt: skip
    assert cells(text, "str-exact, FLOP-aware, target in FLOPs")[-1] == "one seed"
    assert "2 threads of P" in " ".join(text.split())
    assert cells(real_data.real_data(), "Caltech-101 (a part), MobileNetV1 fine-tuned, 90 % zeros")[1:] == [
        *("90.00", "86.00 ± 1.41", "84.00 (gmp, global)", "1, 2, 1", "1.9 of 13.0 MB, 4.5 of 9.0 ms"),
    ]  # fmt: skip
    taught = cells(real_data.real_data(), "the same, both sparse networks with the dense one as teacher")[1:]
    assert taught == ["90.00", "89.00", "not measured", "one seed", "not measured"]
    write(tmp_path, "caltech", [*CALTECH, photograph("dense, 16 epochs", "", 0, 0.92, epochs=16)])
    longer = cells(real_data.real_data(), "the same with 16 epochs each; the teacher has 8")[1:]
    assert longer == ["92.00", "91.00", "not measured", "one seed", "not measured"]
    assert "has 5 epochs" in text


def test_har_stands_beside_the_papers_figures(tmp_path: Path) -> None:
    write(tmp_path, "har_ranks", HAR)
    text = ranks.har_ranks()
    assert cells(text, "str-exact, size of (9,8)") == [
        *("str-exact, size of (9,8)", "(8,7)", "2,000", "92.00", "-1.00", "91.00", "0.01 of 1", "one seed"),
        "95.76 (STR)",
    ]
    assert cells(text, "fixed, size of (9,7)")[1:] == [*["not measured"] * 6, "0", "93.15"]
    assert all(figure in text for figure in ("96.10", "95.62", "95.59", "94.06", "94.88", "96.81", "reconstruction"))
    assert "har6" not in text
    assert cells(ranks.har_six(), "lstm, dense")[2] == "90.00"


def test_readme_has_a_row_for_each_study_with_runs_of_the_default_method_and_of_the_dense_network(
    tmp_path: Path,
) -> None:
    for name, runs in (("cifar", CIFAR[1:]), ("speech_ranks", SPEECH), ("har_ranks", HAR)):
        write(tmp_path, name, runs)
    text = real_data.real_data()
    assert len(text.splitlines()) == 2 + 2  # HAR-6 and CIFAR-10 have no run of str-exact
    row = cells(text, "Speech Commands (five words), GRU, a third of the parameters")
    assert row[1:] == ["82.00", "80.00", "79.00 (fixed)", "one seed", "2,000 of 7,000 parameters"]
    write(tmp_path, "cifar", CIFAR)
    row = cells(real_data.real_data(), "CIFAR-10 as JPEG, ResNet20, 5 epochs, 90 % zeros")
    assert row[1:] == ["90.00", "80.00", "not measured", "one seed", "10 % of the FLOPs"]
    write(tmp_path, "cifar", [*CIFAR, photograph("dense", 0.0, 1, 0.92, model="resnet20")])
    row = cells(real_data.real_data(), "CIFAR-10 as JPEG, ResNet20, 5 epochs, 90 % zeros")
    assert row[4] == "2, 1"  # the dense network has two seeds, str-exact one
    started = [("dense, from dense", 0.0, 0, 0.92), ("str-exact, from dense", 0.9, 0, 0.7)]
    started += [("str-exact, from dense, teacher", 0.9, 0, 0.88), ("gmp, global, from dense, teacher", 0.9, 0, 0.87)]
    write(tmp_path, "cifar", CIFAR + [photograph(*run, model="resnet20") for run in started])
    row = cells(real_data.real_data(), "CIFAR-10 as JPEG, ResNet20, 5 epochs, 90 % zeros")
    assert row[1:] == ["90.00", "80.00", "not measured", "one seed", "10 % of the FLOPs"]
    (row,) = [line for line in real_data.real_data().splitlines() if "5 more epochs" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")[1:4]] == ["92.00", "88.00", "87.00 (gmp, global)"]
    assert cells(photographs.cifar(), "resnet20, str-exact, from dense, teacher")[4] == "-4.00"
    assert cells(photographs.cifar(), "resnet20, str-exact")[4] == "-10.00"
