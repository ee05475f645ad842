"""What a release is made of: metadata, links that work on PyPI, and the files that the source distribution names."""

import importlib.util
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import str_triton

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = load(ROOT / ".ci" / "release.py")


def test_one_version_everywhere():
    assert metadata.version("str-triton") == str_triton.__version__
    assert f"version: {str_triton.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {str_triton.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_console_script_is_the_front():
    (entry,) = (e for e in metadata.entry_points(group="console_scripts") if e.name == "str-triton")
    assert entry.load() is sys.modules["str_triton.__main__"].main


def test_links_of_the_readme_become_absolute():
    text = "![a](docs/a.svg) [b](docs/b.md#c) [d](https://e.org) [f](#g)"
    assert release.with_absolute_links(text, "https://x.org/o/n", "v1") == (
        "![a](https://x.org/o/n/raw/v1/docs/a.svg) [b](https://x.org/o/n/blob/v1/docs/b.md#c) "
        "[d](https://e.org) [f](#g)"
    )
    readme = release.with_absolute_links((ROOT / "README.md").read_text(), "https://x.org/o/n", "v1")
    targets = re.findall(r"\]\(([^)#]*)", readme)
    assert targets
    assert all(target.startswith("https://") for target in targets if target)


def test_the_projects_addresses_are_added():
    urls = tomllib.loads(release.with_addresses(PYPROJECT, "https://x.org/o/n"))["project"]["urls"]
    assert urls["Homepage"] == "https://x.org/o/n"
    assert {"Paper", "Issues", "Changelog", "Documentation"} < urls.keys()


def test_the_source_distribution_names_files_that_exist():
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        command, *places = line.split()
        if command in ("include", "graft"):
            assert all((ROOT / place).exists() for place in places), line
