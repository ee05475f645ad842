"""The processes of one job: if one of them fails, all end soon, and one of them prints why.

They watch each other through the store of torch.distributed's rendezvous, a key-value server, and not through
collectives, which would wait for minutes for a dead process.
"""

import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from types import TracebackType
from typing import NoReturn

from torch import distributed
from torch.distributed import DistError, PrefixStore, Store, rendezvous

from str_triton.training.errors import (
    BAD_INPUT,
    Interrupted,
    UserError,
    as_user_error,
    is_first_process,
    run_program,
    tell,
)
from str_triton.training.signals import SIGNALS

HEARTBEAT = 1.0  # seconds between the heartbeats of a process
DEAD_AFTER = 20  # heartbeats missed before a process counts as dead; torchrun kills the others after 30 seconds
SUSPECT_AFTER = 4  # heartbeats missed before a process counts as dead when an exception has been raised elsewhere
GRACE = 4  # heartbeats that the other processes have to end by themselves after one has failed


def run_job(program: Callable[[], None]) -> int:
    """Run ``program`` as `run_program` does, in a process that may be one of several (torchrun, accelerate launch).

    If one process fails, the others exit with the same code, at the latest after half a minute, and only the message or
    traceback of the first failure is printed. If a process dies, for example by SIGKILL, the others print one line and
    exit with code 2.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run_program(program)
    return run_program(partial(_run_among_others, program))


def _run_among_others(program: Callable[[], None]) -> None:
    with as_user_error(ValueError, DistError):  # no MASTER_ADDR in the environment, or no answer from that address
        store, rank, size = next(rendezvous("env://"))
    with JobMonitor(PrefixStore("job", store), rank, size) as watch, warnings.catch_warnings():
        if rank > 0:  # process 0 prints the same warnings
            warnings.simplefilter("ignore")
        try:
            program()
            _close_group()
            watch.leave()
        except Interrupted as stop:  # raised in all processes, after the same step
            tell(str(stop))
            _close_group()
            watch.leave()
            raise SystemExit(128 + stop.signum) from stop
        except SystemExit as leaving:
            if isinstance(leaving.code, str):
                watch.fail(1, leaving.code)
            watch.leave_parser(leaving.code or 0)
        except UserError as error:
            watch.fail(BAD_INPUT, f"error: {error}")
        except KeyboardInterrupt:
            watch.fail(130, "interrupted")
        except Exception as error:
            watch.fail_with(error)


class JobMonitor:
    """A context manager that sends this process's heartbeats and watches those of the others.

    The store holds four kinds of keys. beat/R is a count that grows while process R lives. failure is "R CODE" of the
    process that failed first. first is nonzero once process 0 has reached its end. gone is the number of other
    processes that have reached theirs.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._over, self._lock, self._reported = threading.Event(), threading.Lock(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "JobMonitor":
        self._store.add(f"beat/{self._rank}", 1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def leave(self, beats: float = math.inf) -> None:
        """Wait for the other processes to reach their end, for at most ``beats`` heartbeats.

        Process 0, which may hold the store, leaves last.
        """
        if self._rank == 0:
            self._store.add("first", 1)
            self._await(lambda: self._store.add("gone", 0) >= self._size - 1, beats)
        else:
            self._await(lambda: self._store.add("first", 0) > 0, beats)
            self.__exit__(None, None, None)  # the store may be gone after the next line
            self._store.add("gone", 1)

    def fail(self, code: int, message: str | None = None) -> NoReturn:
        """Exit with ``code``, and print ``message`` if no process has failed before."""
        _ignore_signals()
        if self._report_failure(code) and message is not None:
            print(message, file=sys.stderr, flush=True)
        with suppress(DistError):
            self.leave(2 * GRACE if self._rank == 0 else 0)
        raise SystemExit(code)

    def leave_parser(self, code: int) -> NoReturn:
        """Exit with ``code`` after process 0 has printed why. Launchers end all processes when the first one fails."""
        if code and self._rank > 0:
            self._await(lambda: self._failure() is not None, 2 * GRACE)
        if code:
            self.fail(code)
        self.leave()
        raise SystemExit(code)

    def fail_with(self, error: Exception) -> NoReturn:
        """Raise ``error``, or exit if another process has failed or died, which may be the cause of ``error``."""
        _ignore_signals()
        failure = self._failure()
        dead = self._dead_processes() if failure is None else []
        if dead:
            self.fail(BAD_INPUT, _death_message(dead, self._size))
        if self._report_failure(1):
            raise error
        self.fail(self._failure() or 1)

    def _watch(self) -> None:
        """Run the thread: send heartbeats, and end this process if another has failed and this one does not end."""
        counts, missed = [0] * self._size, [0] * self._size
        watched = range(1, self._size) if self._rank == 0 else (0,)
        while not self._over.wait(HEARTBEAT):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                for other in watched:
                    count = self._store.add(f"beat/{other}", 0)
                    # The unit is this process's heartbeats, not seconds: if all processes were suspended for a while,
                    # none is dead. A process that is still starting has no count yet.
                    missed[other] = missed[other] + 1 if count == counts[other] > 0 else 0
                    counts[other] = count
                code = self._failure()
                dead = [other for other in watched if missed[other] >= DEAD_AFTER]
            except DistError:
                code, dead = None, [0]
            if code is None and dead:
                code = BAD_INPUT
                if self._report_failure(code):
                    print(_death_message(dead, self._size), file=sys.stderr, flush=True)
            if code is not None and not self._over.wait(GRACE * HEARTBEAT):
                sys.stdout.flush()
                with suppress(DistError):
                    self._store.add("gone", 1)
                os._exit(code)  # the training thread hangs; this is like kill -9, which all files withstand

    def _await(self, condition: Callable[[], bool], beats: float) -> None:
        waited = 0.0
        while waited < beats and not condition():
            time.sleep(HEARTBEAT / 10)
            waited += 0.1

    def _report_failure(self, code: int) -> bool:
        """Record this process's failure. Return whether it is the first one, whose reason is to be printed."""
        own = f"{self._rank} {code}"
        with self._lock:  # both the thread and the program may call this
            if self._reported:
                return False
            self._reported = True
        try:
            return self._store.compare_set("failure", "", own).decode() == own
        except DistError:  # the store is gone, and process 0 with it: the first process of each machine prints
            return self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    def _failure(self) -> int | None:
        """Return the exit code of the process that failed first; None if none has."""
        try:
            return int(self._store.get("failure").decode().split()[1]) if self._store.check(["failure"]) else None
        except DistError:
            return None

    def _dead_processes(self) -> list[int]:
        """Return the other processes that miss `SUSPECT_AFTER` heartbeats."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        try:
            before = [self._store.add(f"beat/{rank}", 0) for rank in others]
            time.sleep(SUSPECT_AFTER * HEARTBEAT)
            now = [self._store.add(f"beat/{rank}", 0) for rank in others]
        except DistError:
            return [0]
        return [rank for rank, *counts in zip(others, before, now, strict=True) if counts[0] == counts[1] > 0]


@contextmanager
def only_first_process_prints() -> Iterator[None]:
    """Discard the output of the block in all processes of a job but the first."""
    if is_first_process():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _close_group() -> None:
    """Destroy the process group, as torch asks for. After a failure this would wait for the dead processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _ignore_signals() -> None:
    """Ignore the launcher's signals, so that it does not end this process before its message is printed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _death_message(dead: list[int], size: int) -> str:
    numbers = ", ".join(map(str, dead))
    who = f"process {numbers} of {size} has" if len(dead) == 1 else f"processes {numbers} of {size} have"
    return (
        f"error: {who} died without a message (killed, out of memory, or lost machine or network); "
        "continue from the last checkpoint with --resume"
    )
