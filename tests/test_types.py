"""The check of types: errors outside of the list, listed modules without one, and what a user's checker reports."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("check_types", ROOT / ".ci" / "check_types.py")
check_types = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_types)


def error(path: str, line: int = 1):
    return check_types.Error(path, line, f"{path}:{line}: error: text")


def test_faults():
    program = "right()\nwrong()  # wrong\nwrong()  # wrong\n"
    fine = [error("a/b.py"), error("a/c/__init__.py"), error(check_types.USER, 2), error(check_types.USER, 3)]
    assert check_types.faults(fine, {"a.b", "a.c"}, program) == []
    (line,) = check_types.faults([*fine, error("a/d.py", 7)], {"a.b", "a.c"}, program)
    assert line.startswith("a/d.py:7")
    (line,) = check_types.faults([*fine, error(check_types.USER, 1)], {"a.b", "a.c"}, program)
    assert line.startswith(f"{check_types.USER}:1")
    (line,) = check_types.faults(fine[:3], {"a.b", "a.c"}, program)
    assert line.startswith(f"{check_types.USER}:3")
    (line,) = check_types.faults(fine, {"a.b", "a.c", "a.e"}, program)
    assert "a.e" in line


def test_the_list_names_modules_that_exist():
    for module in check_types.listed_modules((ROOT / "pyproject.toml").read_text()):
        path = ROOT / re.sub(r"^str_triton\.(?=[cr]nn\b)", "", module).replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module
