"""The processes of one job: where one of them fails all of them end soon, and one says why.

What they know of each other goes through the store by which they found each other (torch.distributed's key-value
server), not through collectives: these wait for minutes for a process that is no more.
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

BEAT = 1.0  # seconds between a process's signs of life
SILENCE = 20  # beats without a sign after which a process counts as dead: torchrun kills the others after 30 seconds
DOUBT = 4  # beats without a sign that are enough once something else has gone wrong
GRACE = 4  # beats that the others have to leave by themselves once a process has failed


def run_job(program: Callable[[], None]) -> int:
    """`run_program`, where this process may be one of several (torchrun, accelerate launch).

    When one process fails, the others leave with the same exit code, within half a minute in any case, and only the
    message or the traceback of the first failure is printed. A process that dies, as by SIGKILL, is one line and exit
    code 2 for the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run_program(program)
    return run_program(partial(_run_among_others, program))


def _run_among_others(program: Callable[[], None]) -> None:
    with as_user_error(ValueError, DistError):  # an environment without MASTER_ADDR, or nobody there
        store, rank, size = next(rendezvous("env://"))
    with Watch(PrefixStore("job", store), rank, size) as watch, warnings.catch_warnings():
        if rank > 0:  # process 0 gives the same ones
            warnings.simplefilter("ignore")
        try:
            program()
            _close_group()
            watch.leave()
        except Interrupted as stop:  # in all processes, after the same step
            tell(str(stop))
            _close_group()
            watch.leave()
            raise SystemExit(128 + stop.signum) from stop
        except SystemExit as leaving:
            watch.leave_parser(leaving.code or 0)
        except UserError as error:
            watch.fail(BAD_INPUT, f"error: {error}")
        except KeyboardInterrupt:
            watch.fail(130, "interrupted")
        except Exception as error:
            watch.fail_by(error)


class Watch:
    """This process's signs of life, and its eye on the others'; a context manager.

    The store holds: beat/R, a count that grows while process R lives; failure, "R CODE" of the process that failed
    first; first, whether process 0 has come to its end, and gone, how many of the others have.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._over, self._lock, self._claimed = threading.Event(), threading.Lock(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._store.add(f"beat/{self._rank}", 1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def leave(self, beats: float = math.inf) -> None:
        """The end: process 0, which may hold the store, comes to it first and leaves last.

        ``beats`` is how long to wait for the others.
        """
        if self._rank == 0:
            self._store.add("first", 1)
            self._await(lambda: self._store.add("gone", 0) >= self._size - 1, beats)
        else:
            self._await(lambda: self._store.add("first", 0) > 0, beats)
            self.__exit__(None, None, None)  # after the next line the store may be gone
            self._store.add("gone", 1)

    def fail(self, code: int, message: str | None = None) -> NoReturn:
        """Leave with ``code``, and say ``message`` where no process has failed before."""
        _ignore_signals()
        if self._claim(code) and message is not None:
            print(message, file=sys.stderr, flush=True)
        with suppress(DistError):
            self.leave(2 * GRACE if self._rank == 0 else 0)
        raise SystemExit(code)

    def leave_parser(self, code: int) -> NoReturn:
        """Leave with ``code`` after process 0 has printed why: launchers end all processes at the first that fails."""
        if code and self._rank > 0:
            self._await(lambda: self._failure() is not None, 2 * GRACE)
        if code:
            self.fail(code)
        self.leave()
        raise SystemExit(code)

    def fail_by(self, error: Exception) -> NoReturn:
        """Leave for ``error``, or for the end of another process where that may be its cause."""
        _ignore_signals()
        failure = self._failure()
        dead = self._silent() if failure is None else []
        if dead:
            self.fail(BAD_INPUT, _obituary(dead, self._size))
        if self._claim(1):
            raise error
        self.fail(self._failure() or 1)

    def _watch(self) -> None:
        """The thread: give signs of life; end this process when another has failed and this one does not end itself."""
        counts, missed = [0] * self._size, [0] * self._size
        watched = range(1, self._size) if self._rank == 0 else (0,)
        while not self._over.wait(BEAT):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                for other in watched:
                    count = self._store.add(f"beat/{other}", 0)
                    # Beats of this process, not seconds: where all were halted for a while, none is to blame.
                    # A process that is still starting has no count yet.
                    missed[other] = missed[other] + 1 if count == counts[other] > 0 else 0
                    counts[other] = count
                code = self._failure()
                dead = [other for other in watched if missed[other] >= SILENCE]
            except DistError:
                code, dead = None, [0]
            if code is None and dead:
                code = BAD_INPUT
                if self._claim(code):
                    print(_obituary(dead, self._size), file=sys.stderr, flush=True)
            if code is not None and not self._over.wait(GRACE * BEAT):
                sys.stdout.flush()
                with suppress(DistError):
                    self._store.add("gone", 1)
                os._exit(code)  # the training thread hangs; what it was writing is as after kill -9

    def _await(self, condition: Callable[[], bool], beats: float) -> None:
        waited = 0.0
        while waited < beats and not condition():
            time.sleep(BEAT / 10)
            waited += 0.1

    def _claim(self, code: int) -> bool:
        """Note this process's failure. Whether it is the first one, and so the one to speak of."""
        own = f"{self._rank} {code}"
        with self._lock:  # the thread and the program may both find out
            if self._claimed:
                return False
            self._claimed = True
        try:
            return self._store.compare_set("failure", "", own).decode() == own
        except DistError:  # the store is gone, and with it process 0: the first of each machine speaks
            return self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    def _failure(self) -> int | None:
        """The exit code of the process that failed first; None where none has."""
        try:
            return int(self._store.get("failure").decode().split()[1]) if self._store.check(["failure"]) else None
        except DistError:
            return None

    def _silent(self) -> list[int]:
        """The other processes that give no sign of life for some beats."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        try:
            before = [self._store.add(f"beat/{rank}", 0) for rank in others]
            time.sleep(DOUBT * BEAT)
            now = [self._store.add(f"beat/{rank}", 0) for rank in others]
        except DistError:
            return [0]
        return [rank for rank, *counts in zip(others, before, now, strict=True) if counts[0] == counts[1] > 0]


@contextmanager
def first_process_speaks() -> Iterator[None]:
    """What the block prints comes from the first process of a job alone."""
    if is_first_process():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _close_group() -> None:
    """What torch asks for at a good end; after a bad one it would wait for the dead."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _ignore_signals() -> None:
    """The launcher, which may have seen another process end, is not to stop this one before it has said why."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _obituary(dead: list[int], size: int) -> str:
    numbers = ", ".join(map(str, dead))
    who = f"process {numbers} of {size} has" if len(dead) == 1 else f"processes {numbers} of {size} have"
    return (
        f"error: {who} died without a word (killed, out of memory, or the machine or the network is gone); "
        "go on from the last checkpoint with --resume"
    )
