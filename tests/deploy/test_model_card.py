"""The model card: front matter for the hub, what the file holds, how to load it, and the budget layer by layer."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from str_triton import LowRankLinear, count, deploy, sparsify
from tests.deploy.packing import holed
from tests.messages import holds

TEXTS = {"title": "A small network", "description": "Trained for a test.\n"}


def sections(text: str) -> tuple[dict, dict[str, str]]:
    """The front matter, and the text under each heading."""
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    parts = re.split(r"^#+ (.*)$\n", body, flags=re.MULTILINE)
    assert parts[0].strip() == ""
    return yaml.safe_load(front), dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_a_card_for_the_hub(tmp_path: Path):
    path = tmp_path / "digits.safetensors"
    model = sparsify(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 10)), initial_threshold=0.05)
    budget = count(model, torch.zeros(1, 1, 8, 8))
    summary = deploy.pack(model, path, budget=budget)
    card = deploy.model_card(
        path,
        **TEXTS,
        facts={"accuracy": "97.5 %", "recipe": "a|b"},
        tags=["image-classification", "sparse"],
        license="apache-2.0",
        datasets=["digits"],
        pipeline_tag="image-classification",
    )
    assert card == tmp_path / "digits.md"
    front, text = sections(card.read_text())
    assert front == {
        "library_name": "pytorch",
        "license": "apache-2.0",
        "pipeline_tag": "image-classification",
        "datasets": ["digits"],
        "tags": ["str-triton", "sparse", "image-classification"],
    }
    assert list(text) == ["A small network", "Files", "Load", "Budget"]
    description, facts = text["A small network"].split("\n\n")
    assert description == "Trained for a test."
    assert cells(facts)[2:] == [["accuracy", "97.5 %"], ["recipe", r"a\|b"]]
    assert text["Files"] == f"`digits.safetensors`: {' '.join(summary.remarks())}"
    lines = cells(text["Budget"])
    assert lines[0] == ["layer", "weights", "nonzeros", "sparsity", "dense FLOPs", "FLOPs", "threshold"]
    assert [line[0] for line in lines[2:]] == ["0", "2", "total"]
    assert lines[-1][1:5] == [
        f"{budget.params:,}",
        f"{budget.nonzeros:,}",
        f"{100 * budget.sparsity:.2f} %",
        f"{budget.dense_flops:,}",
    ]
    assert {len(line) for line in lines} == {7}


def test_what_is_not_covered_is_marked_and_its_share_given(tmp_path: Path):
    model = nn.Linear(30, 20)
    model.table = nn.Parameter(torch.randn(4, 5))
    deploy.pack(model, tmp_path / "a.safetensors", budget=count(sparsify(model), torch.zeros(1, 30)))
    _, text = sections(deploy.model_card(tmp_path / "a.safetensors", **TEXTS).read_text())
    table, remark = text["Budget"].split("\n\n")
    assert [line[0] for line in cells(table)[2:]] == ["(model)", "table (not covered)", "total, covered", "total"]
    assert "1 matrix, 3.23 %" in remark


def test_the_code_on_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    saved = {"weight": holed(30, 40), "bias": torch.zeros(30)}
    deploy.pack(saved, "linear.packed.safetensors")
    text = deploy.model_card("linear.packed.safetensors", **TEXTS).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model = nn.Linear(40, 30)
    exec(code, {"model": model})
    assert torch.equal(model.weight, saved["weight"])
    text = deploy.model_card("linear.packed.safetensors", **TEXTS, code="print(1)\n").read_text()
    assert "```python\nprint(1)\n```" in text


def test_without_a_budget_the_table_is_by_tensor_and_of_factors_by_matrix(tmp_path: Path):
    deploy.pack({"conv.weight": torch.eye(100)}, tmp_path / "a.safetensors")
    front, text = sections(deploy.model_card(tmp_path / "a.safetensors", **TEXTS).read_text())
    assert front == {"library_name": "pytorch", "tags": ["str-triton", "sparse"]}
    assert cells(text["Budget"])[2][:5] == ["conv.weight", "100x100", "gaps", "10,000", "100"]
    deploy.pack(LowRankLinear(100, 50, max_rank=3), tmp_path / "b.safetensors")
    front, text = sections(deploy.model_card(tmp_path / "b.safetensors", **TEXTS).read_text())
    assert front["tags"] == ["str-triton", "low-rank"]
    assert cells(text["Budget"])[0][:5] == ["matrix", "rows", "columns", "max rank", "rank"]
    assert cells(text["Budget"])[2][:5] == ["weight", "50", "100", "3", "3"]
    assert holds(text["Files"], "1 matrix .. factors .. rank 3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deploy.pack(nn.Linear(50, 50), tmp_path / "c.safetensors")
    front, text = sections(deploy.model_card(tmp_path / "c.safetensors", **TEXTS).read_text())
    assert front["tags"] == ["str-triton"]
    assert "all are stored dense" in text["Files"]


def test_a_title_cannot_break_the_front_matter(tmp_path: Path):
    deploy.pack({"a": holed(20, 50)}, tmp_path / "x")
    front, _ = sections(deploy.model_card(tmp_path / "x", **TEXTS, tags=["a: [b", "---"]).read_text())
    assert front["tags"] == ["str-triton", "sparse", "a: [b", "---"]


def test_a_damaged_file_and_one_in_the_cards_place(tmp_path: Path):
    deploy.pack({"a": holed(20, 50)}, tmp_path / "x.md")
    with pytest.raises(ValueError, match=r"x\.md: .* another suffix"):
        deploy.model_card(tmp_path / "x.md", **TEXTS)
    content = (tmp_path / "x.md").read_bytes()
    (tmp_path / "x").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is cut off"):
        deploy.model_card(tmp_path / "x", **TEXTS)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x", "x.md"]
