"""One run's services behind one object, so that a training loop reads as training."""

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

ENVIRONMENT = "environment.json"
OWN = ("step", "seconds", "random")  # what a run adds to a checkpoint
# Jobs of several processes agree on signals about this often: agreeing costs a round of messages, and a launcher that
# was told to stop kills them after 30 seconds.
MEETING_SECONDS, MEETING_STEPS = 2.0, 100
PATIENCE = 10.0  # seconds in which a signal may come again through the launcher


class Run:
    """A run folder with its checkpoints, metrics, progress bar and signals.

    Every process of a job has one and calls the same methods; the first process alone writes and prints. Make it with
    `open`, use it as a context manager, and call `restore` before anything else.
    """

    def __init__(self, accelerator: Accelerator, folder: RunFolder | None, program: str) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.path = Path(broadcast_object_list([str(folder.path) if folder else ""])[0])
        self._program = program
        self._checkpoints = Checkpoints(self.path / "checkpoints")
        self._stop = StopRequest(0.0 if accelerator.num_processes == 1 else PATIENCE)
        self._signum = 0
        self._met, self._meeting = (0, time.monotonic()), 0  # step and time of the last agreement; step of the next one
        self._began = time.monotonic()
        self._metrics: Metrics | None = None
        self._bar: ProgressBar | None = None

    @classmethod
    def open(
        cls, accelerator: Accelerator, config: Mapping[str, Any], run_dir: str | Path, *, resume: bool, program: str
    ) -> "Run":
        """Make the folder ``run_dir`` for ``config`` (plain values), or take over the one that is there to resume.

        ``program`` is the command to be named in messages. Raises `UserError` when the folder cannot be had.
        """
        folder = None
        if accelerator.is_main_process and resume:
            folder = RunFolder.reopen(run_dir)
        elif accelerator.is_main_process:
            environment = describe_environment(accelerator.device, accelerator.num_processes)
            texts = {CONFIG: config, ENVIRONMENT: environment}
            folder = RunFolder.create(run_dir, {name: json.dumps(text, indent=2) for name, text in texts.items()})
        return cls(accelerator, folder, program)

    def restore(self, total_steps: int) -> dict[str, Any] | None:
        """Return the state in the newest whole checkpoint; None at the very beginning of a run.

        Random states are put back; a process that had none gets one of its own, so that no two draw the same numbers.
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
        self._met = step, time.monotonic()
        if self.folder is not None:
            if state is None and (self.path / METRICS).exists():
                warn(f"there is no checkpoint in {self.path}: the run begins again")
            with self.as_damaged_checkpoint(step), as_user_error(OSError):
                self._metrics = Metrics(self.path, step, state and state.get("record"))
                if state is not None:
                    self._record_session(step)
            self._bar = ProgressBar(total_steps, step)
        return state

    @contextmanager
    def as_damaged_checkpoint(self, step: int) -> Iterator[None]:
        """Turn what a checkpoint's wrong content raises in a block that takes it over into a `UserError`."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint {self._checkpoints.path(step)} is not of this run ({one_line(error)[:100]}): "
                "remove it to go on from the one before"
            ) from error

    def log(self, record: Record) -> Record:
        """Append a record to the metrics and return it as it stands there, with the time.

        Raises `UserError` when it cannot be written, or holds a number that is NaN or infinite.
        """
        record = record | {"seconds": round(self.elapsed(), 3)}
        if self._metrics is not None:
            try:
                with as_user_error(OSError):
                    self._metrics.append(record)
            except ValueError as error:
                raise self.diverged(record["step"], "a number of the metrics became NaN or infinite") from error
        return record

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint of ``state`` and the random states of all processes, which meet here."""
        states = gather_object([random_state()])
        if self._metrics is not None:
            with as_user_error(OSError):
                self._metrics.sync()
            own = dict(zip(OWN, (step, self.elapsed(), states), strict=True))
            self._checkpoints.save(step, {**state, **own})

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file of the run folder atomically. Raises `UserError` when it cannot be written."""
        if self.folder is not None:
            with as_user_error(OSError):
                self.folder.write(name, content)

    def write_budget(self, budget: Budget | RankBudget) -> None:
        """Write budget.csv and budget.json, each atomically. Raises `UserError` when they cannot be written."""
        if self.folder is not None:
            with as_user_error(OSError):
                budget.to_csv(self.path / "budget.csv")
                budget.to_json(self.path / "budget.json")

    def stopping(self, step: int) -> bool:
        """Whether SIGINT or SIGTERM came to any process. Those of a job agree on it now and then, at the same steps."""
        if self.accelerator.num_processes == 1:
            self._signum = self._stop.signum or 0
        elif step >= self._meeting:
            self._agree(step)
        return self._signum != 0

    def _agree(self, step: int) -> None:
        (before, then), now = self._met, time.monotonic()
        seconds = (now - then) / max(1, step - before)
        own = torch.tensor([[self._stop.signum or 0, seconds]], device=self.accelerator.device)
        signum, seconds = self.accelerator.gather(own).amax(0).tolist()
        self._signum = int(signum)
        self._met, self._meeting = (step, now), step + max(1, min(MEETING_STEPS, int(MEETING_SECONDS / seconds)))

    def leave(self, step: int) -> NoReturn:
        """Raise `Interrupted`; to be called when `stopping`, and ``step`` is saved."""
        command = f"{self._program} --resume --run-dir {self.path}"
        raise Interrupted(self._signum, f"stopped after step {step}, which is saved; go on with: {command}")

    def require_finite(self, step: int, loss: float, tensors: Iterable[Tensor] = ()) -> None:
        """Raise `UserError` when ``loss`` or a number in ``tensors`` is NaN or infinite. Waits for the device."""
        finite = [tensor.isfinite().all() for tensor in tensors]
        if not math.isfinite(loss) or (finite and not bool(torch.stack(finite).all())):
            raise self.diverged(step, "the loss became NaN or infinite")

    def diverged(self, step: int, what: str) -> UserError:
        """Return the error that training has diverged, for ``what`` was found by ``step``."""
        steps = self._checkpoints.steps()
        kept = f"the last good checkpoint is {self._checkpoints.path(steps[-1])}" if steps else "no checkpoint was made"
        return UserError(f"{what} by step {step}; {kept}; try a smaller --lr")

    @property
    def due(self) -> bool:
        """Whether it is time to `show` again, and so to fetch numbers from the device."""
        return self._bar is not None and self._bar.due

    def show(self, step: int, text: str) -> None:
        """Draw ``text`` in the progress bar, or print it where there is no terminal."""
        if self._bar is not None:
            self._bar.show(step, text)

    def say(self, message: str) -> None:
        """Print on standard output, from the first process."""
        if self.folder is not None:
            print(message)

    def elapsed(self) -> float:
        """Seconds that this run has taken, those before a resume included (up to the checkpoint that it began from)."""
        return time.monotonic() - self._began

    def end_training(self) -> None:
        """Close the bar and the metrics; the folder stays this run's until the block ends."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        self._bar = self._metrics = None

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

    def _record_session(self, step: int) -> None:
        """Add this session's environment to environment.json: it may not be the one that the run began in."""
        session = {"step": step, **describe_environment(self.accelerator.device, self.accelerator.num_processes)}
        try:
            environment = json.loads(self.folder.read(ENVIRONMENT))
            environment["resumed"] = [*environment.get("resumed", []), session]
            text = json.dumps(environment, indent=2)
        except (AttributeError, FileNotFoundError, RecursionError, TypeError, ValueError) as error:
            path = self.path / ENVIRONMENT
            warn(f"{path} is damaged ({one_line(error)[:100]}); it is written anew, without the sessions before")
            text = json.dumps({"resumed": [session]}, indent=2)
        self.folder.write(ENVIRONMENT, text)
