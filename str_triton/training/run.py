"""A run: one object for its folder, checkpoints, metrics, progress bar and signals."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from str_triton.budget.budget import Budget
from str_triton.budget.rank_budget import RankBudget
from str_triton.training.checkpoints import Checkpoints, random_state, set_random_state_of
from str_triton.training.environment import describe_environment
from str_triton.training.errors import Interrupted, UserError, as_user_error, one_line, warn
from str_triton.training.metrics import FILE as METRICS
from str_triton.training.metrics import Metrics, Record
from str_triton.training.progress import ProgressBar
from str_triton.training.run_folder import CONFIG, RunFolder
from str_triton.training.signals import StopRequest
from str_triton.training.trackers import TRACKED, Tracker, require_tracker

ENVIRONMENT = "environment.json"
OWN = ("step", "seconds", "random")  # the entries that a run adds to a checkpoint
# Processes of a job agree on signals about this often. Agreeing costs a round of messages. A launcher that was told to
# stop kills its processes after 30 seconds.
AGREE_SECONDS, AGREE_STEPS = 2.0, 100
PATIENCE = 10.0  # seconds in which the launcher may send the same signal again


class Run:
    """A run folder with its checkpoints, metrics, progress bar and signals.

    Every process of a job has one and calls the same methods. Only the first process writes and prints. Make it with
    `open`, use it as a context manager, and call `restore` first.
    """

    def __init__(self, accelerator: Accelerator, folder: RunFolder | None, program: str) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.path = Path(broadcast_object_list([str(folder.path) if folder else ""])[0])
        self._program = program
        self._checkpoints = Checkpoints(self.path / "checkpoints")
        self._stop = StopRequest(0.0 if accelerator.num_processes == 1 else PATIENCE)
        self._signum = 0
        self._agreed = 0, time.monotonic()  # step and time of the last agreement on signals
        self._next_agreement = 0  # its step
        self._began = time.monotonic()
        self._metrics: Metrics | None = None
        self._tracker: Tracker | None = None
        self._bar: ProgressBar | None = None

    @classmethod
    def open(
        cls, accelerator: Accelerator, config: Mapping[str, Any], run_dir: str | Path, *, resume: bool, program: str
    ) -> "Run":
        """Make the folder ``run_dir`` for ``config`` (plain values), or with ``resume`` open the existing one.

        Messages name the command ``program``. Raises `UserError` if the folder cannot be made or opened.
        """
        folder = None
        log_with = config.get("log_with", "")
        if accelerator.is_main_process:
            require_tracker(log_with)
        if accelerator.is_main_process and resume:
            folder = RunFolder.reopen(run_dir)
        elif accelerator.is_main_process:
            environment = describe_environment(accelerator.device, accelerator.num_processes)
            texts = {CONFIG: config, ENVIRONMENT: environment}
            folder = RunFolder.create(run_dir, {name: json.dumps(text, indent=2) for name, text in texts.items()})
        run = cls(accelerator, folder, program)
        if folder is not None and log_with in TRACKED:
            run._tracker = Tracker(log_with, folder, config)
        return run

    def restore(self, total_steps: int) -> dict[str, Any] | None:
        """Return the state in the newest undamaged checkpoint; None if the run has none yet.

        Random states are restored. A process without a saved state gets a new one, so that no two processes draw the
        same numbers.
        """
        state = self._checkpoints.load(keys=OWN) if self.folder else None
        step = broadcast_object_list([state["step"] if state else 0])[0]
        if step and not self.folder:
            state = self._checkpoints.load(owner=False, keys=OWN)
        if not self.folder and (state["step"] if state else 0) != step:
            raise UserError(
                f"process {self.accelerator.process_index} finds no checkpoint of step {step} in {self.path}: "
                "keep the run in a directory that all machines share"
            )
        with self.as_damaged_checkpoint(step):
            set_random_state_of(self.accelerator.process_index, state["random"] if state else [random_state()])
            self._began -= state["seconds"] if state else 0.0
        self._agreed = step, time.monotonic()
        if self.folder is not None:
            if state is None and (self.path / METRICS).exists():
                warn(f"there is no checkpoint in {self.path}: the run starts again")
            with self.as_damaged_checkpoint(step), as_user_error(OSError):
                self._metrics = Metrics(self.path, step, state and state.get("record"))
                if state is not None:
                    self._record_session(self.folder, step)
            self._bar = ProgressBar(total_steps, step)
        return state

    @contextmanager
    def as_damaged_checkpoint(self, step: int) -> Iterator[None]:
        """Turn exceptions of a block that loads the checkpoint of ``step`` into `UserError`: its content is wrong."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint {self._checkpoints.path(step)} does not fit this run ({one_line(error)[:100]}): "
                "move it elsewhere to continue from the one before"
            ) from error

    def log(self, record: Record) -> Record:
        """Append a record, with the time added, to the metrics, and return it.

        Raises `UserError` if it cannot be written, or if one of its numbers is NaN or infinite.
        """
        record = record | {"seconds": round(self.elapsed(), 3)}
        if self._metrics is not None:
            try:
                with as_user_error(OSError):
                    self._metrics.append(record)
            except ValueError as error:
                raise self.diverged(record["step"], "a number of the metrics became NaN or infinite") from error
        if self._tracker is not None:
            self._tracker.append(record)
        return record

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint of ``state`` and of the random states of all processes. Call it in all of them."""
        states = gather_object([random_state()])
        if self._metrics is not None:
            with as_user_error(OSError):
                self._metrics.sync()
            own = dict(zip(OWN, (step, self.elapsed(), states), strict=True))
            self._checkpoints.save(step, {**state, **own})

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file of the run folder atomically. Raise `UserError` if it cannot be written."""
        if self.folder is not None:
            with as_user_error(OSError):
                self.folder.write(name, content)

    def change_config(self, values: Mapping[str, Any]) -> None:
        """Write the present values of options to config.json. Raise `UserError` if it cannot be written."""
        if self.folder is not None and values:
            self.write(CONFIG, json.dumps(json.loads(self.folder.read(CONFIG)) | values, indent=2))

    def write_budget(self, budget: Budget | RankBudget) -> None:
        """Write budget.csv and budget.json, each atomically. Raise `UserError` if they cannot be written."""
        if self.folder is not None:
            with as_user_error(OSError):
                budget.to_csv(self.path / "budget.csv")
                budget.to_json(self.path / "budget.json")

    def stopping(self, step: int) -> bool:
        """Return whether a process got SIGINT or SIGTERM. All processes of a job return it at the same step."""
        if self.accelerator.num_processes == 1:
            self._signum = self._stop.signum or 0
        elif step >= self._next_agreement:
            self._agree(step)
        return self._signum != 0

    def _agree(self, step: int) -> None:
        (before, then), now = self._agreed, time.monotonic()
        seconds = (now - then) / max(1, step - before)
        own = torch.tensor([[self._stop.signum or 0, seconds]], device=self.accelerator.device)
        signum, seconds = self.accelerator.gather(own).amax(0).tolist()
        self._signum = int(signum)
        self._agreed = step, now
        self._next_agreement = step + max(1, min(AGREE_STEPS, int(AGREE_SECONDS / seconds)))

    def leave(self, step: int) -> NoReturn:
        """Raise `Interrupted`. Call this if `stopping`, after ``step`` was saved."""
        command = f"{self._program} --resume --run-dir {self.path}"
        raise Interrupted(self._signum, f"stopped after step {step}, which is saved; continue with: {command}")

    def require_finite(self, step: int, loss: float, tensors: Iterable[Tensor] = ()) -> None:
        """Raise `UserError` if ``loss`` or a number in ``tensors`` is NaN or infinite. Synchronizes with the device."""
        finite = [tensor.isfinite().all() for tensor in tensors]
        if not math.isfinite(loss) or (finite and not bool(torch.stack(finite).all())):
            raise self.diverged(step, "the loss became NaN or infinite")

    def diverged(self, step: int, what: str) -> UserError:
        """Return the error for training that has diverged. ``what`` was found at ``step``."""
        steps = self._checkpoints.steps()
        kept = f"the last good checkpoint is {self._checkpoints.path(steps[-1])}" if steps else "no checkpoint was made"
        return UserError(f"{what} by step {step}; {kept}; try a smaller --lr")

    @property
    def due(self) -> bool:
        """True if it is time to call `show` again, for which numbers are fetched from the device."""
        return self._bar is not None and self._bar.due

    def show(self, step: int, text: str) -> None:
        """Draw ``text`` in the progress bar, or print it if there is no terminal."""
        if self._bar is not None:
            self._bar.show(step, text)

    def say(self, message: str) -> None:
        """Print on standard output, in the first process only."""
        if self.folder is not None:
            print(message)

    def elapsed(self) -> float:
        """Return the seconds that this run has taken, including those before the checkpoint it was resumed from."""
        return time.monotonic() - self._began

    def end_training(self) -> None:
        """Close the progress bar, the metrics and the tracker. The folder stays locked until the block ends."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._tracker is not None:
            self._tracker.close()
        self._bar = self._metrics = self._tracker = None

    def __enter__(self) -> "Run":
        self._stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.__exit__(kind, error, trace)
        self.end_training()
        if self.folder is not None:
            self.folder.close()

    def _record_session(self, folder: RunFolder, step: int) -> None:
        """Add this session's environment, which may differ from earlier ones, to environment.json."""
        session = {"step": step, **describe_environment(self.accelerator.device, self.accelerator.num_processes)}
        try:
            environment = json.loads(folder.read(ENVIRONMENT))
            environment["resumed"] = [*environment.get("resumed", []), session]
            text = json.dumps(environment, indent=2)
        except (AttributeError, FileNotFoundError, RecursionError, TypeError, ValueError) as error:
            path = self.path / ENVIRONMENT
            warn(f"{path} is damaged ({one_line(error)[:100]}); it is replaced, without the earlier sessions")
            text = json.dumps({"resumed": [session]}, indent=2)
        folder.write(ENVIRONMENT, text)
