"""The README keeps its word: its tables, its links, its Python, and the script that runs its commands."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import documents, readme_tables
from tests.check_readme import check_for, commands, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_up_to_date() -> None:
    assert readme_tables.main(["--check"]) == 0, "run python -m benchmarks.readme_tables"


def test_a_table_is_made_anew() -> None:
    def missing() -> str:
        return documents.markdown(["a"], [[str(len(documents.results("no-such-result-*.json")))]])

    text = "x\n<!-- table:one -->\nold\n<!-- /table -->\ny\n<!-- table:two -->\n<!-- /table -->\n"
    made = documents.fill(text, {"one": lambda: documents.markdown(["a", "b"], [["c", "1"]]), "two": missing})
    assert made == (
        "x\n<!-- table:one -->\n| a | b |\n| --- | ---: |\n| c | 1 |\n<!-- /table -->\n"
        "y\n<!-- table:two -->\nNot measured.\n<!-- /table -->\n"
    )


@pytest.mark.parametrize("text", ["", "<!-- table:other -->\n<!-- /table -->\n", "<!-- table:one -->\nnever closed\n"])
def test_markers_and_tables_must_correspond(text: str) -> None:
    with pytest.raises(ValueError, match="one"):
        documents.fill(text, {"one": str})


def test_a_spread_is_the_mean_and_the_sample_deviation() -> None:
    assert documents.spread([0.5, 0.6, 0.7], scale=100, digits=1) == "60.0 ± 10.0"
    assert documents.spread([0.25]) == "0.25"


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10))
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(4)]
    names = {"model": model, "batches": batches}
    exec(compile(code, "README.md", "exec"), names)
    if "densify" in names:
        weights = torch.cat([parameter.flatten() for parameter in names["model"].parameters() if parameter.dim() > 1])
        assert 0 < weights.count_nonzero() <= 0.5 * weights.numel()


def test_commands_are_found() -> None:
    text = "```bash\nmake demo  # why\n\n# only a comment\npython a.py \\\n    --b 'c#d'\n```\n```python\nno()\n```\n"
    assert list(commands(text)) == ["make demo", "python a.py --b 'c#d'"]


@pytest.mark.parametrize(
    ("command", "instead", "options"),
    [
        ("make demo", "make demo", []),
        ("make test PYTHON=python3.12", "make --dry-run test PYTHON=python3.12", []),
        ("python cnn/train.py --epochs 1", "python cnn/train.py --epochs 1", []),
        ("python cnn/train.py --data a --data-dir DIR", "python cnn/train.py --help", ["--data", "--data-dir"]),
        ("python cnn/train.py --data hub:NAME", "python cnn/train.py --help", ["--data"]),
        ("python -m benchmarks.speed --quick", "python -m benchmarks.speed --help", ["--quick"]),
        ("pip install -e .", "pip install --dry-run -e .", []),
    ],
)
def test_a_command_runs_as_it_stands_or_as_a_stand_in(command: str, instead: str, options: list[str]) -> None:
    check = check_for(command)
    assert (check.command, check.options) == (instead, options)
    assert bool(check.why) == (command != instead)


def test_a_broken_command_is_found() -> None:
    assert run(check_for("true")) == ""
    assert "exit code 1" in run(check_for("false | true"))
    assert "exit code 127" in run(check_for("no-such-program --help"))
    help_of_python = check_for("python -m benchmarks.readme_tables --chec")
    assert "does not name --chec" in run(help_of_python)
    assert run(check_for("python -m benchmarks.readme_tables --check")) == ""
