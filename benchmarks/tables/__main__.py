"""The program that makes the documents' tables from benchmarks/results: python -m benchmarks.tables [--check].

To add a table, write its function in one of benchmarks/tables/*.py (see `documents`), put the two markers into the
document, and run this program.
"""

import argparse
import sys

from benchmarks.tables import (  # noqa: F401 (they register their tables)
    cnn,
    deploy,
    integers,
    photographs,
    ranks,
    real_data,
    recurrent,
    rnn,
    speed,
)
from benchmarks.tables.documents import DOCUMENTS, fill


def main(arguments: list[str] | None = None) -> int:
    """Write the documents' tables. With --check only print whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    check = parser.parse_args(arguments).check
    outdated = 0
    for document, tables in DOCUMENTS.items():
        old = document.read_text()
        new = fill(old, tables, document.name)
        if check and new != old:
            print(f"{document.name} is out of date: run python -m benchmarks.tables", file=sys.stderr)
            outdated = 1
        elif new != old:
            document.write_text(new)
    return outdated


if __name__ == "__main__":
    sys.exit(main())
