import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from str_triton.budget.rank_budget import MatrixBudget, RankBudget
from str_triton.training.metrics import Metrics
from str_triton.training.report import report
from tests.training.test_report import require_readable

BUDGET = RankBudget(
    [
        MatrixBudget("rnn.weight_ih_l0", 96, 12, 12, 4, 0.31, False),
        MatrixBudget("rnn.<hh>", 96, 32, 32, 8, 0.31, True),
        MatrixBudget("rnn.weight_hh_l1", 96, 32, 32, 32, None, True),
    ],
    other_params=777,
)


def run_folder(folder: Path, name: str, *, epochs: int = 3, rows: int = 3, cut: int = 0) -> Path:
    """Write a finished run; before epoch ``cut`` no matrix is in factors."""
    budget = RankBudget(BUDGET.rows[:rows], 777)
    value = 0.97 if name == "accuracy" else 1.875
    summary = {name: value, f"validation_{name}": value if name == "accuracy" else None}
    summary |= {"ranks": {row.name: row.rank for row in budget.rows}, "params": budget.params}
    summary |= {"dense_params": budget.dense_params, "epochs": epochs, "seconds": 20.4, "seed": 3, "recipe": "small"}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"data": "text", "cell": "gru", "method": "str", "seed": 3}))
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}}))
    (folder / "data.json").write_text(json.dumps({"name": "text", "sha256": "5eed"}))
    budget.to_json(folder / "budget.json")
    metrics = Metrics(folder)
    for epoch in range(1, epochs + 1):
        layers = {
            row.name: {
                "rank": row.rank,
                "threshold": row.threshold,
                "spectrum": [1 / (k + epoch) for k in range(row.max_rank)],
            }
            for row in (budget.rows if epoch >= cut else [])
        }
        figures = {"train_loss": 1.5, "loss": 1.4, "train_accuracy": 0.9, "accuracy": 0.8, "params": budget.params}
        metrics.append({"kind": "epoch", "step": epoch, "epoch": epoch, **figures, "layers": layers})
    metrics.close()
    return folder


@pytest.mark.parametrize(
    ("name", "options", "pictures"),
    [
        ("accuracy", {}, 6),
        ("bits_per_character", {"epochs": 1}, 6),
        ("accuracy", {"cut": 2, "rows": 1}, 4),
        ("accuracy", {"rows": 0}, 2),
    ],
)
def test_the_page_has_its_pictures(tmp_path: Path, name: str, options: dict, pictures: int):
    page = report(run_folder(tmp_path, name, **options))
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(found) == pictures
    for picture in found:
        ElementTree.fromstring(picture)
        require_readable(picture)


def test_the_page_shows_the_figures(tmp_path: Path):
    page = report(run_folder(tmp_path, "accuracy"))
    share = f"{100 * BUDGET.params / BUDGET.dense_params:.1f} %"
    for text in (
        f"small: 97.00 % accuracy with {share}",
        f"{BUDGET.params:,}",
        "rnn.&lt;hh&gt;",
        "44",
        "5eed",
        ">20 s<",
    ):
        assert text in page
    assert "cell gru" in page
    assert "<hh>" not in page


def test_a_language_model_is_shown_in_bits(tmp_path: Path):
    page = report(run_folder(tmp_path, "bits_per_character"))
    assert "small: 1.875 bits per character with" in page
    assert "<b>1.875</b><span>test bits per character</span>" in page
    assert "validation data, also trained on" in page
