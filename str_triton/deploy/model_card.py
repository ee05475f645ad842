"""Model cards for packed files: Markdown with the budget layer by layer, for the Hugging Face hub."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from str_triton.budget.budget import Budget
from str_triton.deploy.pack import inspect
from str_triton.files import printable, write_atomically

LOAD = """from str_triton import deploy

state_dict = deploy.unpack("{name}")  # plain dense tensors; damaged bytes raise
model.load_state_dict(state_dict)  # model: the plain network, without thresholds
model.eval()"""


def model_card(
    path: str | os.PathLike[str],
    *,
    title: str,
    description: str,
    facts: Mapping[str, str] | None = None,
    code: str | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
    pipeline_tag: str | None = None,
) -> Path:
    """Write a model card beside a packed file, under its name with the suffix .md, and return its path.

    On the hub a model card is the README.md beside the files.

    Args:
        path: the packed file; the card's sizes and budget are read from it.
        title: the heading.
        description: a description of the model, one or more paragraphs of Markdown.
        facts: a table of further facts: {"accuracy": "97.5 % on the test set", ...}.
        code: Python lines that load the model; None: lines that call the plain network's `load_state_dict`.
        tags, license, datasets, pipeline_tag: the hub's own fields; empty ones are left out.

    Raises:
        ValueError: the packed file is damaged, or its name ends in .md.
        OSError: a file cannot be read or written.
    """
    path = Path(path)
    card = path.with_suffix(".md")
    if card == path:
        raise ValueError(f"{path}: the model card takes this name; give the packed file another suffix")
    summary = inspect(path)
    kind = "low-rank" if summary.products else "sparse"
    fields = {
        "library_name": "pytorch",
        "license": license,
        "pipeline_tag": pipeline_tag,
        "datasets": list(datasets),
        "tags": list(dict.fromkeys(["str-triton", *([kind] if summary.is_smaller else []), *tags])),
    }
    budget = summary if summary.budget is None else summary.budget
    remarks = budget.remarks() if isinstance(budget, Budget) else []
    code = LOAD.format(name=path.name) if code is None else code.strip("\n")
    sections = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items() if value), "---"]),
        f"# {title}",
        description.strip("\n"),
        *([_table(("", ""), *facts.items())] if facts else []),
        f"## Files\n\n`{path.name}`: {' '.join(summary.remarks())}",
        f"## Load\n\nWith str-triton installed:\n\n```python\n{code}\n```\n\n"
        "`str-triton inspect` lists the content of the file, `str-triton unpack` writes it as "
        "plain safetensors. To read it without str-triton, see str-triton's docs/packed-format.md.",
        "\n\n".join(["## Budget", _table(*budget.lines()), *remarks]),
    ]
    write_atomically(card, "\n\n".join(sections), "\n")
    return card


def _table(heading: Sequence[str], *lines: Iterable[str]) -> str:
    """Return a Markdown table. The first column is text, the others are aligned to the right."""
    rule = [":--", *["--:"] * (len(heading) - 1)]
    escaped = ([printable(cell).replace("|", "\\|") for cell in line] for line in (heading, rule, *lines))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
