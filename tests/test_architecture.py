"""Who may import whom, read from the source: DESIGN's arrows (CONTRIBUTING.md draws them), and what an import costs.

A room is a folder of the house (str_triton/ops, cnn, ...), or a file of its ground floor (GROUND). The folders cnn/ and
rnn/ are installed as str_triton.cnn and str_triton.rnn. Imports inside functions count as well; two of the rules are
about exactly those.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import str_triton
from str_triton import deploy
from str_triton.programs import EXTRAS, PROGRAMS, script_of

ROOT = Path(__file__).parents[1]
FOLDERS = ("str_triton", "cnn", "rnn")
STDLIB = frozenset(sys.stdlib_module_names)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
METADATA = PYPROJECT["project"]
TRAINING_EXTRAS = {re.split(r"[<>=]", extra)[0] for extra in METADATA["optional-dependencies"]["train"]} | {"PIL"}

# Room -> the rooms it may import besides itself and the ground floor, and the libraries besides the standard one.
ROOMS = {
    "str_triton.files": (set(), set()),
    "str_triton.machine": (set(), set()),
    "str_triton.programs": (set(), set()),
    "str_triton.arguments": (set(), set()),
    "str_triton": ({"str_triton.ops", "str_triton.nn", "str_triton.budget", "str_triton.deploy"}, set()),
    "str_triton.kernels": (set(), {"triton"}),
    "str_triton.native": (set(), {"torch"}),
    "str_triton.ops": ({"str_triton.native"}, {"torch"}),
    "str_triton.nn": ({"str_triton.native", "str_triton.ops"}, {"torch", "numpy"}),
    "str_triton.budget": ({"str_triton.nn", "str_triton.ops"}, {"torch", "numpy"}),
    "str_triton.deploy": (
        {"str_triton.native", "str_triton.nn", "str_triton.budget"},
        {"torch", "numpy", "safetensors"},
    ),
    "str_triton.deploy.onnx_export.loops": (set(), {"onnxscript"}),
    "str_triton.training": ({"str_triton.budget"}, {"torch", "numpy", "pyarrow"} | TRAINING_EXTRAS),  # of datasets
    "str_triton.integrations": ({"str_triton"}, {"torch", "transformers", "lightning"}),
    "str_triton.cnn": (
        {"str_triton", "str_triton.deploy", "str_triton.training"},
        {"torch", "numpy", "einops", "safetensors"} | TRAINING_EXTRAS,
    ),
    "str_triton.rnn": (
        {"str_triton", "str_triton.deploy", "str_triton.training"},
        {"torch", "numpy", "einops", "safetensors"} | TRAINING_EXTRAS,
    ),
}
# Only inside functions: the launcher's kernels arrive with the first GPU tensor, the hub's client with the first call,
# timm with the first of its networks, the ONNX extra with the first exported network.
LATE = {
    "str_triton.ops": ({"str_triton.kernels"}, {"triton"}),
    "str_triton.deploy": (
        {"str_triton.deploy.onnx_export.loops"},
        {"huggingface_hub", "onnx", "onnxruntime", "onnxscript"},
    ),
    "str_triton.training": (set(), {"huggingface_hub"}),  # of datasets
    "str_triton.cnn": (set(), {"timm", "onnxruntime"}),
    "str_triton.rnn": (set(), {"onnx", "onnxruntime"}),
}
# The ground floor: every room may import it, but the device code, which imports triton and nothing else.
GROUND = {"str_triton.files", "str_triton.machine", "str_triton.programs", "str_triton.arguments"}
# The files that import the programs or their recipes by the names in the table of str_triton/programs.py.
BY_TABLE = {
    Path("str_triton/__main__.py"): "PROGRAMS[name].module",
    Path("str_triton/programs.py"): "PROGRAMS[name].recipes",
}
# What these rooms take from those in PUBLIC are their public names.
USERS = {"str_triton.cnn", "str_triton.rnn", "str_triton.integrations"}
PUBLIC = {"str_triton": str_triton.__all__, "str_triton.deploy": deploy.__all__}


class Import(NamedTuple):
    """`module` as an absolute name, `name` what is taken from it (None: the module itself)."""

    line: int
    module: str
    name: str | None
    late: bool


def source_files() -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts if parts[0] == "str_triton" else ("str_triton", *parts)).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room that a module of the house lies in: the longest name in ROOMS that it begins with."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*re.sub(r"^str_triton\.(?=[cr]nn\b)", "", name).split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(source: str, path: Path) -> Iterator[Import]:
    """Every import in a file: statements at any depth, import_module("...") and __import__("...")."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, alias.name, None, late) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join([*package[: len(package) - level + 1 if level else 0], *([module] if module else [])])
                for alias in names:
                    submodule = f"{base}.{alias.name}"
                    is_own = base.split(".")[0] == "str_triton" and is_module(submodule)
                    yield Import(node.lineno, submodule if is_own else base, None if is_own else alias.name, late)
            case ast.Call(func=ast.Name(id="import_module"), args=[name]) if path in BY_TABLE:
                assert ast.unparse(name) == BY_TABLE[path]
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"), args=[first, *_]
            ):
                yield Import(node.lineno, ast.literal_eval(first), None, late)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    return visit(ast.parse(source), late=False)


def violations(source: str, path: Path) -> list[str]:
    """One line for each import that no arrow allows."""
    room = room_of(module_name(path))
    rooms, libraries = ROOMS[room]
    if room != "str_triton.kernels":
        rooms = rooms | GROUND
    late_rooms, late_libraries = LATE.get(room, (set(), set()))
    found = []
    for line, module, name, late in imports(source, path):
        top = module.split(".")[0]
        where = f"{path}:{line}"
        if top != "str_triton":
            allowed = libraries | (late_libraries if late else set())
            if top not in allowed and (top not in STDLIB or room == "str_triton.kernels"):
                found.append(f"{where}: {room} may not import {top}" + (" here" if top in late_libraries else ""))
            continue
        target = room_of(module)
        if target not in rooms | {room} | (late_rooms if late else set()):
            found.append(f"{where}: {room} may not import {target}" + (" here" if target in late_rooms else ""))
        elif room in USERS and target in PUBLIC:
            if module != target:
                found.append(f"{where}: {module} is not public: take its names from {target}")
            elif name not in (None, *PUBLIC[target]):
                found.append(f"{where}: {target}.{name} is not a public name")
    return found


@pytest.mark.parametrize("path", source_files(), ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    assert not violations((ROOT / path).read_text(), path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("str_triton/kernels/x.py", "import torch"),
        ("str_triton/kernels/x.py", "import math"),
        ("str_triton/kernels/x.py", "from str_triton.ops import thresholds"),
        ("str_triton/ops/x.py", "from str_triton.kernels import soft_threshold"),
        ("str_triton/ops/x.py", "from ..kernels import soft_threshold"),
        ("str_triton/ops/x.py", "import triton"),
        ("str_triton/ops/x.py", "def f():\n    import numpy"),
        ("str_triton/ops/x.py", "import importlib\nimportlib.import_module('triton')"),
        ("str_triton/files.py", "import torch"),
        ("str_triton/files.py", "from str_triton import kernels"),
        ("str_triton/kernels/x.py", "from str_triton.files import printable"),
        ("str_triton/nn/x.py", "from str_triton import sparsify"),
        ("str_triton/nn/x.py", "def f():\n    from str_triton.budget import count"),
        ("str_triton/nn/x.py", "def f():\n    from str_triton import kernels"),
        ("str_triton/budget/x.py", "import str_triton.deploy"),
        ("str_triton/training/x.py", "import str_triton.deploy"),
        ("str_triton/deploy/x.py", "from str_triton.training.errors import warn"),
        ("str_triton/deploy/x.py", "import str_triton.cnn.models"),
        ("str_triton/training/x.py", "import str_triton.cnn.data"),
        ("str_triton/__init__.py", "from str_triton import training"),
        ("str_triton/__init__.py", "from . import training"),
        ("cnn/x.py", "def f():\n    from str_triton.rnn import cells"),
        ("cnn/x.py", "import timm"),
        ("cnn/x.py", "from str_triton.nn import STRConv2d"),
        ("cnn/x.py", "from str_triton import _private"),
        ("cnn/x.py", "from str_triton.deploy.pack import unpack"),
        ("cnn/x.py", "from str_triton.deploy import packed_file"),
        ("cnn/x.py", "from str_triton.deploy import _private"),
        ("cnn/x.py", "import recipes"),
        ("str_triton/integrations/x.py", "from str_triton.nn import ThresholdHolder"),
        ("str_triton/integrations/x.py", "from str_triton.training.x import f"),
        ("str_triton/budget/x.py", "from str_triton.integrations.x import f"),
        ("cnn/x.py", "import cnn.recipes"),
        ("rnn/x.py", "__import__('str_triton.cnn.models')"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert violations(source, Path(path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("str_triton/kernels/x.py", "import triton.language as tl\nfrom str_triton.kernels.soft_threshold import f"),
        ("str_triton/files.py", "import os\nfrom pathlib import Path"),
        ("str_triton/ops/x.py", "from str_triton.files import printable"),
        ("str_triton/__init__.py", "from str_triton import files"),
        ("cnn/x.py", "from str_triton.files import replacing"),
        ("str_triton/ops/x.py", "def f():\n    from str_triton.kernels import soft_threshold\n    import triton"),
        ("str_triton/nn/x.py", "import math\nfrom str_triton.ops.soft_threshold import f\nfrom . import y"),
        (
            "cnn/x.py",
            "from str_triton import soft_threshold\nfrom str_triton.training.x import f\nimport str_triton.cnn.y",
        ),
        ("cnn/x.py", "from str_triton import deploy\nfrom str_triton.deploy import unpack"),
    ],
)
def test_an_allowed_import_is_not(path: str, source: str) -> None:
    assert not violations(source, Path(path))


def test_the_table_names_programs_and_the_extras_that_pyproject_names() -> None:
    for program in PROGRAMS.values():
        assert room_of(program.module) in ("str_triton.cnn", "str_triton.rnn")
        assert "def main(" in (ROOT / script_of(program.module)).read_text()
    assert set(EXTRAS["train"]) == TRAINING_EXTRAS - {"pillow"}


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """The largest sets of files each of which imports, by way of others, every one of its set."""

    def reached(file: str) -> set[str]:
        found, left = set(), [file]
        while left:
            new = edges[left.pop()] - found
            found |= new
            left += new
        return found

    reach = {file: reached(file) for file in edges}
    found = {frozenset(other for other in reach[file] if file in reach[other]) for file in edges}
    return [set(circle) for circle in found if circle]


def test_no_files_import_each_other_in_a_circle() -> None:
    """Inside functions neither: what needs each other is one thing, or lacks a third that both rest on."""
    files = {module_name(path): path for path in source_files()}
    edges = {
        name: {taken.module for taken in imports((ROOT / path).read_text(), path)} & files.keys() - {name}
        for name, path in files.items()
    }
    assert not circles(edges)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"a"}}) == [{"a", "b", "c"}]


def test_cnn_and_rnn_reach_no_hidden_name_through_the_package() -> None:
    found = []
    for path in source_files():
        if path.parts[0] in ("cnn", "rnn"):
            for node in ast.walk(ast.parse((ROOT / path).read_text())):
                match node:
                    case ast.Attribute(value=ast.Name(id="str_triton"), attr=name):
                        if name not in (*str_triton.__all__, "deploy", "training", "__version__"):
                            found.append(f"{path}:{node.lineno}: str_triton.{name} is not a public name")
                    case ast.Attribute(value=ast.Name(id="deploy"), attr=name):
                        if name not in deploy.__all__:
                            found.append(f"{path}:{node.lineno}: str_triton.deploy.{name} is not a public name")
    assert not found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def names_of_libraries() -> set[str]:
    """The distributions in constraints.txt (some are imported under another name: those find_spec finds)."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normalized(line.split("==")[0]) for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("folder", ["cnn", "rnn"])
def test_no_file_hides_a_library(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python cnn/train.py` puts cnn/ first on Python's path: a cnn/datasets.py would hide Hugging Face's."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != ROOT])
    libraries = names_of_libraries() | set(FOLDERS)
    for path in sorted((ROOT / folder).iterdir()):
        name = path.stem
        if name.startswith("_") or not (path.suffix == ".py" or (path / "__init__.py").is_file()):
            continue
        assert name not in STDLIB, f"{path} hides the standard library's {name}"
        assert normalized(name) not in libraries, f"{path} hides the library {name}"
        assert importlib.util.find_spec(name) is None, f"{path} hides an installed library"


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without an __init__.py would be left out of the wheel."""
    folders = {path.parent for path in source_files()}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {
        module_name(folder / "__init__.py") for folder in folders
    }


def untyped(path: Path) -> Iterator[str]:
    """The arguments without a type of a file's public functions, and of its public classes' public methods."""
    tree = ast.parse((ROOT / path).read_text())
    owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    for owner in owners:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and node.name != "__init__"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in arguments[0 if owner is tree else 1 :]:
                if argument.annotation is None and argument.arg not in ("self", "cls"):
                    yield f"{path}:{node.lineno}: {node.name}({argument.arg})"


@pytest.mark.parametrize("path", [path for path in source_files() if "kernels" not in path.parts], ids=str)
def test_public_arguments_have_types(path: Path) -> None:
    assert not list(untyped(path))


# Folders in which docstrings of functions begin with a verb ("Return", "Write"). This list only grows.
PLAIN_ENGLISH = (
    *(
        "str_triton",
        "str_triton/deploy",
        "str_triton/integrations",
        "str_triton/training",
        "cnn",
        "cnn/data",
        "cnn/methods",
    ),
    *("str_triton/budget", "str_triton/nn", "str_triton/nn/recurrent", "str_triton/ops", "str_triton/ops/cells"),
    *("str_triton/deploy/sparse", "str_triton/deploy/sparse/executions", "str_triton/deploy/sparse/runtime"),
    *("str_triton/deploy/c_export", "str_triton/deploy/onnx_export", "str_triton/deploy/sparse/graph"),
    *("str_triton/kernels", "rnn", "rnn/data"),
)
NO_VERB = re.compile(
    "An?|The|Th(is|at|ese|ose)|Its?|One|Two|Three|All|Any|Both|Each|Every|None|Nothing|Some|Such|"
    "Wh(at|en|ere|ether|ich|o|ose|y|ole)|How|If|Unless|"
    "About|After|As|At|Before|Beside|By|For|From|In|Inside|Of|On|To|Under|With(in|out)?|"
    "Accuracy|Bytes|Figures?|Numbers?|Names?|Pictures?|Seconds|True|False"
)


def docstrings_without_a_verb(source: str, path: Path) -> Iterator[str]:
    """Yield the functions, except properties, whose docstring does not begin with a capitalized verb."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        is_property = any(isinstance(name, ast.Name) and "property" in name.id for name in node.decorator_list)
        if text is None or is_property:
            continue
        word = re.split(r"[\s,:;.]", text, maxsplit=1)[0]
        if NO_VERB.fullmatch(word) or not re.fullmatch(r"[A-Z][a-z-]+", word):
            yield f"{path}:{node.lineno}: {node.name}: {text.splitlines()[0]}"


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    paths = [path for path in source_files() if path.parent.as_posix() in PLAIN_ENGLISH]
    found = [line for path in paths for line in docstrings_without_a_verb((ROOT / path).read_text(), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        ("Return the sum.", True),
        ("Go once through the images.", True),
        ("The sum.", False),
        ("Whether it is due.", False),
        ("`largest` of the scores.", False),
        ("float32 [B, C] -> float32 [B].", False),
        ("-0.0 in bits.", False),
    ],
)
def test_a_docstring_without_a_verb_is_found(text: str, is_fine: bool) -> None:
    function = f'def f(self):\n        """{text}"""\n'
    assert bool(list(docstrings_without_a_verb(function, Path("x.py")))) != is_fine
    a_property = f"class C:\n    @property\n    {function}"
    assert not list(docstrings_without_a_verb(a_property, Path("x.py")))


def test_importing_needs_neither_triton_nor_the_extras_nor_a_gpu() -> None:
    code = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"triton", "safetensors", "transformers", "lightning", *{sorted(TRAINING_EXTRAS)}}}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
import str_triton, cnn, rnn

assert str_triton.__all__ and all(hasattr(str_triton, name) for name in str_triton.__all__)
assert not any(name.startswith(("str_triton.training", "str_triton.deploy")) for name in sys.modules)
assert not sys.modules["torch"].cuda.is_initialized()
assert "torch._dynamo" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
