"""Check an installed wheel: python .ci/check_wheel.py WHEEL, in the environment that it is installed in.

The wheel has one top-level name, imports from outside the repository, and its programs name the extra that they need.
"""

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Exit with a message if a check fails."""
    names = zipfile.ZipFile(sys.argv[1]).namelist()
    packages = {top for name in names if not (top := name.split("/")[0]).endswith(".dist-info")}
    assert packages == {"str_triton"}, packages
    assert "str_triton/py.typed" in names, "type checkers ignore a package without py.typed"

    import str_triton
    import str_triton.cnn
    import str_triton.rnn

    assert Path(sys.prefix) in Path(str_triton.__file__).parents, str_triton.__file__
    program = Path(sys.executable).with_name("str-triton")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    assert version == str_triton.__version__ in Path(sys.argv[1]).name, version
    if find_spec("accelerate") is None:
        for command in ([program, "train-cnn"], [sys.executable, "-m", "str_triton.cnn.train"]):
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 2, result
            assert result.stderr.count("\n") == 1, result.stderr
            assert "str-triton[train]" in result.stderr, result.stderr
    print(f"{Path(sys.argv[1]).name}: {version}, one top-level name, imports, names its extra")


if __name__ == "__main__":
    main()
