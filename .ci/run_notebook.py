"""Execute the code cells of a notebook and store their outputs in it.

python .ci/run_notebook.py examples/quickstart.ipynb
"""

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """Execute the code cells in order, in the current folder, and return the names that they define.

    Each cell gets what it printed and drew as its outputs. An error in a cell is raised.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), start=1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        text = printed.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
        cell["outputs"] += [picture(figure) for figure in plt.get_fignums()]
        cell["execution_count"] = number
    return names


def picture(number: int) -> dict[str, Any]:
    """Return a figure of matplotlib as an output of a cell, and close it."""
    file = io.BytesIO()
    plt.figure(number).savefig(file, format="png", metadata={"Software": None})
    plt.close(number)
    image = base64.b64encode(file.getvalue()).decode()
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": image}}


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    notebook = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        execute(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
