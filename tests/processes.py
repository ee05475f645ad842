"""Jobs of several gloo processes on this machine, forked from a server that has imported the programs already."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["str_triton.cnn.train", "str_triton.rnn.train", "torch._dynamo", "torch.distributed.fsdp"]
)
PATIENCE = 300  # seconds; a job takes one or two, but a machine may be busy


@dataclass
class Job:
    """The exit codes of a job's processes, and what each printed."""

    codes: list[int]
    out: list[str]
    err: list[str]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return a launcher's environment for a process. It uses the loopback: a machine's own name may lead nowhere."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **loopback,
    }


def run_job(folder: Path, program: Callable[..., int], *args: object, size: int = 2) -> Job:
    """Run ``program(*args)`` in ``size`` processes; what they print goes to files in ``folder``."""
    port = free_port()
    processes = [CONTEXT.Process(target=_run, args=(folder, rank, size, port, program, args)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
        process.join()
    texts = [[(folder / f"{kind}{rank}").read_text() for rank in range(size)] for kind in ("out", "err")]
    return Job([process.exitcode for process in processes], *texts)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank() -> int:
    return int(os.environ["RANK"])


def _run(folder: Path, number: int, size: int, port: int, program: Callable[..., int], args: Sequence[object]) -> None:
    os.environ.update(environment(number, size, port))
    torch.set_num_threads(1)
    for kind, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{kind}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.exit(program(*args))
