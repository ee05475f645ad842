"""Many checks in one job of several processes: every process calls the same checks in the same order."""

import datetime
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed

from tests import processes

TIMEOUT = datetime.timedelta(seconds=60)  # for one collective
Check = Callable[[int, int], None]  # of a process's rank and the number of processes


def outcomes(checks: Callable[[], dict[str, Check]], folder: Path, size: int) -> dict[str, str]:
    """Run checks in `size` processes; return by name what failed, "" for a check that passed everywhere.

    A process that fails leaves: the others lose their connection to it, so that no later check runs.

    Args:
        checks: a function of a module, which each process calls.
        folder: an empty one.
    """
    job = processes.run_job(folder, _run, checks, folder / "store", size=size)
    failures: dict[str, list[str]] = {}
    for out in job.out:
        for name, failure in map(json.loads, out.splitlines()):
            failures.setdefault(name, []).append(failure)
    incomplete = "not run by every process\n" + "\n".join(job.err)
    return {
        name: "\n".join(filter(None, failures.get(name, [])))
        or ("" if len(failures.get(name, [])) == size else incomplete)
        for name in checks()
    }


def _run(checks: Callable[[], dict[str, Check]], store: Path) -> int:
    """Be one process of a job."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=processes.rank(),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )
    try:
        for name, check in checks().items():
            torch.manual_seed(0)
            failure = ""
            try:
                check(distributed.get_rank(), distributed.get_world_size())
            except Exception:
                failure = f"process {distributed.get_rank()}:\n{traceback.format_exc()}"
            print(json.dumps([name, failure]), flush=True)
            if failure:
                return 1
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    return 0
