"""README and docs/ keep their word: tables, links, Python, and the script that runs their commands."""

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import str_triton
from benchmarks.tables import __main__ as readme_tables
from benchmarks.tables import concept_pictures, documents
from str_triton import deploy
from tests.check_commands import DOCUMENTS, ELSEWHERE, ROOT, check_for, commands, run

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(code, id=f"{document.relative_to(ROOT).with_suffix('')}-{number}")
    for document in DOCUMENTS
    for number, code in enumerate(PYTHON.findall(document.read_text()))
]


def test_tables_are_up_to_date() -> None:
    assert readme_tables.main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_pictures_are_up_to_date() -> None:
    assert concept_pictures.main(["--check"]) == 0, "run python -m benchmarks.tables.concept_pictures"


def test_the_reference_has_every_public_name_once() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    names = [path_in_reference(module, name) for module in (str_triton, deploy) for name in module.__all__]
    names += [f"str_triton.integrations.{name}" for name in ("lightning", "transformers")]
    assert sorted(re.findall(r"^::: (\S+)$", pages, re.MULTILINE)) == sorted(names)


def path_in_reference(module: ModuleType, name: str) -> str:
    """Return the path that shows a public name. A function with its module's name would show the module otherwise."""
    defined_in = getattr(getattr(module, name), "__module__", None) or ""
    return f"{defined_in if defined_in.endswith(f'.{name}') else module.__name__}.{name}"


def test_attributes_in_the_reference_have_one_name_each() -> None:
    """mkdocstrings takes what follows the first space of an attribute's name for its type, and a line for one name."""
    for module in (str_triton, deploy):
        for name in module.__all__:
            text = inspect.getdoc(getattr(module, name)) or ""
            for section in re.findall(r"^(?:Attributes|Args):\n((?:    .*\n?)+)", text, re.MULTILINE):
                assert re.findall(r"\. [a-z]\w*(?:, \w+)*: ", section) == [], name
            for section in re.findall(r"^Attributes:\n((?:    .*\n?)+)", text, re.MULTILINE):
                names = re.findall(r"^    (\S.*?):", section, re.MULTILINE)
                assert [found for found in names if not re.fullmatch(r"\w+( \(.+\))?", found)] == [], name


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_code_on_the_site_is_as_narrow_as_a_page(page: Path) -> None:
    lines = [line for code in FENCED.findall(page.read_text()) for line in code.splitlines()]
    assert [line for line in lines if len(line) > 82] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_no_code_stands_inside_a_list(page: Path) -> None:
    """On the site, code that is indented by two spaces ends the list, and the items behind it become one paragraph."""
    assert re.findall(r"^ +```.*", page.read_text(), re.MULTILINE) == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_formulas_fit_a_phone(page: Path) -> None:
    """A line of 42 characters is as wide as a page of 390 pixels. Formulas are the blocks without a fence."""
    text = FENCED.sub("", page.read_text())
    assert [line for line in re.findall(r"^    (.+)$", text, re.MULTILINE) if len(line) > 42] == []


def test_code_in_the_reference_is_as_narrow_as_a_page() -> None:
    """A block of code in a docstring is a paragraph that begins indented; the text of a section does not."""
    public = [getattr(module, name) for module in (str_triton, deploy) for name in module.__all__]
    members = [member for value in public if isinstance(value, type) for member in vars(value).values()]
    for value in public + members:
        if getattr(value, "__module__", "").startswith("str_triton"):
            paragraphs = (inspect.getdoc(value) or "").split("\n\n")
            code = [line for part in paragraphs if part.startswith("    ") for line in part.splitlines()]
            assert [line for line in code if len(line) > 4 + 82] == [], value


def test_the_reference_shows_the_asterisks_of_patterns() -> None:
    """Outside of backticks, Markdown takes two asterisks of a docstring for emphasis, which only words should have."""
    public = [getattr(module, name) for module in (str_triton, deploy) for name in module.__all__]
    members = [member for value in public if isinstance(value, type) for member in vars(value).values()]
    for value in public + members:
        if not getattr(value, "__module__", "").startswith("str_triton"):
            continue  # numbers, and classes of torch
        text = re.sub(r"`[^`]+`", "", getattr(value, "__doc__", None) or "")
        assert re.findall(r"\*(?![\s*])(?![\w ]+\*)[^*]*(?<!\s)\*", text) == [], value


def test_the_site_has_every_page_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == sorted(pages)


def test_a_table_is_made_anew() -> None:
    def missing() -> str:
        return documents.markdown(["a"], [[str(len(documents.results("no-such-result-*.json")))]])

    text = "x\n<!-- table:one -->\nold\n<!-- /table -->\ny\n<!-- table:two -->\n<!-- /table -->\n"
    made = documents.fill(text, {"one": lambda: documents.markdown(["a", "b"], [["c", "1"]]), "two": missing})
    assert made == (
        "x\n<!-- table:one -->\n| a | b |\n| --- | ---: |\n| c | 1 |\n<!-- /table -->\n"
        "y\n<!-- table:two -->\n<!-- /table -->\n"
    )


@pytest.mark.parametrize("text", ["", "<!-- table:other -->\n<!-- /table -->\n", "<!-- table:one -->\nnever closed\n"])
def test_markers_and_tables_must_correspond(text: str) -> None:
    with pytest.raises(ValueError, match="one"):
        documents.fill(text, {"one": str})


def test_a_spread_is_the_mean_and_the_sample_deviation() -> None:
    assert documents.spread([0.5, 0.6, 0.7], scale=100, digits=1) == "60.0\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}10.0"
    assert documents.spread([0.25]) == "0.25"


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub names them."""
    lines = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, *(ROOT / "docs" / name for name in ELSEWHERE), ROOT / "CONTRIBUTING.md"]
)
def test_links_lead_somewhere(document: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", document.read_text()):
        if "://" not in target:
            page = document.parent / target if target else document
            assert page.exists(), target
            assert not anchor or anchor in headings(page), f"{target}#{anchor}"


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10))
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(4)]
    names = {"model": model, "batches": batches}
    for extra in {"transformers", "lightning"} & set(re.findall(r"^from (\w+)", code, re.MULTILINE)):
        pytest.importorskip(extra, reason=f"needs the extra {extra}")
    exec(compile(code, "block", "exec"), names)
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
    help_of_python = check_for("python -m benchmarks.tables --chec")
    assert "does not name --chec" in run(help_of_python)
    assert run(check_for("python -m benchmarks.tables --check")) == ""


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
