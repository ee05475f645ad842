"""The first minutes on a GPU, in under 8 minutes: tests, compute-sanitizer, and the figures that only a card can give.

    python -m benchmarks.gpu [--json PATH] [--only PART ...] [--device cpu]

Each part runs in a process of its own, for a limited time. After each, the JSON file is written with what the part
had measured, by default benchmarks/results/gpu_CARD.json. Started again with the same file, the command runs the parts
that are not done, whatever has ended it before. `--device cpu` rehearses every part with tiny sizes and time to spare.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import machine
from benchmarks.gpu.part import PARTS, Part, Session
from benchmarks.gpu.watchdog import end_with_parent
from str_triton.files import write_atomically

ROOT = Path(__file__).parents[2]
GRACE = 10  # Seconds for a process to start and to import torch.


def in_process(part: Part, device: str, folder: Path) -> dict[str, Any]:
    """Run a part in a process of its own, and return its state, seconds and result."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--child", part.name, "--folder", folder]
    begin, errors, limit = time.monotonic(), folder / "errors.txt", part.limit(device)
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=stderr, start_new_session=True) as process,
    ):
        try:
            status = process.wait(limit + GRACE)
            state = "done" if status == 0 else f"failed, exit status {status}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit} s"
        finally:  # Also after ^C; and a part's own processes belong to its group, and may have outlived it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    written = folder / "result.json"
    found = {"state": state, "seconds": round(time.monotonic() - begin, 1)}
    found["result"] = json.loads(written.read_text()) if written.exists() else {}
    if state != "done":
        found["errors"] = errors.read_text(errors="replace").splitlines()[-30:]
    return found


def run_parts(
    names: list[str], path: Path, device: str, run: Callable[[Part, str, Path], dict[str, Any]] = in_process
) -> dict[str, Any]:
    """Run the parts that the file does not hold as done, and write the file after each. Return what it holds.

    Raises ValueError for a file that holds something else, and OSError for one that cannot be written: before the first
    part, or after the last one. Figures that do not fit on the disk in between are written after the next part.
    """
    record = {"machine": machine(device), "parts": {}}
    if path.exists():
        before = read(path)
        if before["machine"] != record["machine"]:
            raise ValueError(f"{path} holds figures of another machine or other versions: give another --json")
        record = before
    write(path, record)
    unwritten: OSError | None = None
    for name in names:
        if record["parts"].get(name, {}).get("state") == "done":
            print(f"{name}: done before")
            continue
        print(f"{name}, at most {PARTS[name].limit(device)} s", flush=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a killed process may still write
            found = record["parts"][name] = run(PARTS[name], device, Path(folder))
        try:
            write(path, record)
            unwritten = None
        except OSError as error:
            unwritten = error
            print(f"{error}: trying again after the next part", file=sys.stderr)
        print(f"{name}: {found['state']}, {found['seconds']} s", flush=True)
    if unwritten is not None:
        raise unwritten
    return record


def read(path: Path) -> dict[str, Any]:
    """Return what an earlier run has written. Raise ValueError where a file holds something else, or half of it."""
    try:
        record = json.loads(path.read_text())
        whole = all(isinstance(part, dict) for part in (record["machine"], *record["parts"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} holds no figures of this command: remove it, or give another --json")
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 if all parts are done, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        end_with_parent()
        part = PARTS[options.child]
        part.run(Session(options.device, options.folder, part.limit(options.device)))
        return 0
    if options.device == "cpu" and options.json is None:
        parser.error("--device cpu measures nothing worth keeping: give its file with --json")
    try:
        card = machine(options.device)["gpu"]
        path = options.json or ROOT / f"benchmarks/results/gpu_{re.sub(r'[^a-z0-9]+', '-', card.lower())}.json"
        record = run_parts(options.only, path, options.device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {path}")
    return int(any(record["parts"][name]["state"] != "done" for name in options.only))


if __name__ == "__main__":
    sys.exit(main())
