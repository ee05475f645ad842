"""The parts of a release: metadata, links that work on PyPI, and the files of the two distributions."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist and the wheel of the files that git tracks; return their folder."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: git says which files belong to a release")
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return out


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def test_the_source_distribution_holds_all_files_that_its_tests_read(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    left_out = {name for name in tracked_files() - held if not name.startswith(".github/")}
    assert left_out == {".gitignore", ".pre-commit-config.yaml"}


def test_the_wheel_holds_the_code_under_one_name(built: Path):
    """The wheel has one top-level name; .ci/check_wheel.py imports it in an empty environment at each release."""
    (path,) = built.glob("*.whl")
    held = set(zipfile.ZipFile(path).namelist())
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"str_triton"}
    places = {"cnn/": "str_triton/cnn/", "rnn/": "str_triton/rnn/", "str_triton/": "str_triton/"}
    code = {
        name.replace(old, new, 1) for name in tracked_files() for old, new in places.items() if name.startswith(old)
    }
    assert code <= held
