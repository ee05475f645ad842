"""The epoch loop of the training programs: steps, logs, checkpoints, signals, and resuming with the same bits."""

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.linalg import LinAlgError

from str_triton.budget.errors import DivergedError
from str_triton.training.checkpoints import (
    require_same_data,
    require_same_interface,
    require_same_networks,
    require_same_shapes,
    require_shown,
)
from str_triton.training.command_line import CommandLine
from str_triton.training.config import TrainConfig, check_parts, make_accelerator
from str_triton.training.errors import as_user_error
from str_triton.training.fingerprint import Fingerprint
from str_triton.training.interface import Interface
from str_triton.training.job import only_first_process_prints, run_job
from str_triton.training.meter import Means, Meter, Throughput
from str_triton.training.metrics import Record
from str_triton.training.opening import opening
from str_triton.training.run import Run
from str_triton.training.run_folder import RunFolder, default_run_dir

LOG_STEPS = 50


class Controller(Protocol):
    """The interface of an object that moves a model to its target: a controller, or a method with masks."""

    def step(self, progress: float) -> None:
        """Update the model after an optimizer step. ``progress`` is the share of training that is done."""

    def exact(self) -> AbstractContextManager:
        """Return a context in which the schedule's value holds exactly. Training is not affected."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`."""


class StepOutput(NamedTuple):
    """The results of a batch: its mean loss, scores [N, classes] and labels [N]."""

    loss: Tensor
    outputs: Tensor
    labels: Tensor


@dataclass(kw_only=True)
class Loop(ABC):
    """The training of a model. Programs define the batches, the forward pass, and the measurements of an epoch.

    Attributes:
        config: the run's options.
        accelerator: device, precision and processes.
        steps: optimizer steps in an epoch.
        model: the model.
        network: the model as wrapped for several processes and precisions.
        optimizer: the model's optimizer.
        interface: the model's inputs and outputs. A resumed run keeps those that it began with.
        fingerprints: those of the data, by part: training, validation, test. A resumed run refuses other data.
        controller: the object that moves the model to its target; None if there is no target.
        max_norm: the gradient's norm is clipped to this; None: no clipping.
        networks: hashes of the trained networks that options name and the training uses, by option.
        changed: the program's own options that a resumed run is given anew: the values before and now, by field.
        record: the metrics of the last epoch; None in the first epoch.
    """

    config: TrainConfig
    accelerator: Accelerator
    steps: int
    model: nn.Module
    network: nn.Module
    optimizer: AcceleratedOptimizer
    interface: Interface
    fingerprints: dict[str, Fingerprint]
    controller: Controller | None
    max_norm: float | None = None
    networks: dict[str, str] = field(default_factory=dict)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    record: Record | None = None

    @classmethod
    @abstractmethod
    def prepare(cls, config: TrainConfig, accelerator: Accelerator) -> Self:
        """Read the data and build model, controller and optimizer. Raise `UserError` for options that do not fit."""

    @classmethod
    def main(cls, command_line: CommandLine, args: Sequence[str] | None = None) -> int:
        """Train with the options ``args`` (default: the command line's) and return the program's exit code."""
        return run_job(partial(cls._main, command_line, sys.argv[1:] if args is None else list(args)))

    @classmethod
    def _main(cls, command_line: CommandLine, args: Sequence[str]) -> None:
        # All arguments are checked before anything is written.
        with only_first_process_prints():
            config = command_line.read(args)
            changed = command_line.changed(config)  # before any process can write the configuration
        accelerator = make_accelerator(config)
        check_parts(config, accelerator.num_processes)
        run_dir, plain = config.run_dir or default_run_dir(config.recipe), dataclasses.asdict(config)
        if accelerator.is_main_process:
            RunFolder.check(run_dir, resume=config.resume)
        experiment = cls.prepare(config, accelerator)
        experiment.changed = changed
        with Run.open(accelerator, plain, run_dir, resume=config.resume, program=command_line.command) as run:
            run.say(opening(experiment.facts(), accelerator, run.path))
            experiment.train(run)
            experiment.finish(run)

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Return the first lines of a run, about data, model and target, by heading."""

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield this process's part of an epoch's batches, from number ``start`` on, on the device."""

    @abstractmethod
    def forward(self, batch: Any) -> StepOutput:
        """Run the network on a training batch, or on a part of one."""

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step number ``step``, counted from 0."""

    @abstractmethod
    def measure(self, run: Run, epoch: int) -> Record:
        """Evaluate after ``epoch`` epochs, write the budget, and return the measured values for the metrics.

        The loop calls it inside ``exact()``. The method checks its values with ``run.require_finite``.
        """

    @abstractmethod
    def status(self, epoch: int, means: Means) -> str:
        """Return the progress bar's text, with the means of the epoch so far."""

    @abstractmethod
    def finish(self, run: Run) -> None:
        """Write the remaining files of the run after the last epoch, and print the result."""

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027 (most programs have nothing to do then)
        """Prepare an epoch. The loop calls this before its first step, and when a run is resumed within the epoch."""

    def train(self, run: Run) -> None:
        """Train from the run's last checkpoint to the last epoch. Write a checkpoint and a budget after each epoch."""
        total = self.config.epochs * self.steps
        meter, throughput = Meter(self.accelerator.device), Throughput()
        step = self.restore(run, meter)
        while step < total:
            epoch = step // self.steps
            with self.as_divergence(run, step):
                self.begin_epoch(epoch)
            self.network.train()
            throughput.reset()
            for batch in self.batches(epoch, step % self.steps):
                step += 1
                with self.as_divergence(run, step):
                    self.train_step(batch, step - 1, meter)
                    if self.controller is not None:
                        self.controller.step(step / total)
                throughput.add(self.config.batch_size)
                if run.due or step == total:
                    text = self.status(epoch, meter.means())
                    run.show(step, f"{text}  {throughput.per_second():,.0f} examples/s")
                if step % LOG_STEPS == 0:
                    self.log_step(run, step, meter)
                if step % self.steps != 0:
                    with throughput.paused():
                        self.maybe_checkpoint(run, step, meter)
            self.end_epoch(run, step, meter, throughput)
            if run.stopping(step):
                run.leave(step)

    def train_step(self, batch: Any, step: int, meter: Meter) -> None:
        """Take one step of the optimizer, and add the batch's results to ``meter``."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = split(batch, self.config.accumulate)
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)  # the processes reduce their gradients only in the last backward pass
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                output = self.forward(part)
                self.accelerator.backward(output.loss / len(parts))
            meter.add(*output)
        if self.max_norm is not None:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def as_divergence(self, run: Run, step: int) -> Iterator[None]:
        """Turn exceptions of the block into `UserError` if the cause is weights that are NaN, infinite or too large."""
        try:
            yield
        except (ArithmeticError, RuntimeError, ValueError) as error:
            run.require_finite(step, 0.0, self.model.state_dict().values())
            if isinstance(error, (LinAlgError, DivergedError)):
                raise run.diverged(step, "the weights became too large for their singular values") from error
            raise

    def exact(self) -> AbstractContextManager:
        """Return a context, for evaluating and saving, in which the schedule's value holds exactly."""
        return nullcontext() if self.controller is None else self.controller.exact()

    def log_step(self, run: Run, step: int, meter: Meter) -> None:
        """Log loss and accuracy of the epoch so far."""
        means = meter.all_means(self.accelerator)
        run.require_finite(step, means.loss)
        rate = self.learning_rate(step - 1)
        run.log({"kind": "step", "step": step, "lr": rate, "loss": means.loss, "accuracy": means.accuracy})

    def maybe_checkpoint(self, run: Run, step: int, meter: Meter) -> None:
        """Save a checkpoint within an epoch if one is due, and end the run if a signal has asked for it."""
        stopping = run.stopping(step)
        if stopping or step % self.config.checkpoint_steps == 0:
            run.require_finite(step, meter.all_means(self.accelerator).loss, self.model.state_dict().values())
            with self.as_divergence(run, step), self.exact():
                self.save(run, step, meter)
        if stopping:
            run.leave(step)

    def end_epoch(self, run: Run, step: int, meter: Meter, throughput: Throughput) -> None:
        """Measure, and write metrics and a checkpoint, all at the schedule's exact value."""
        training, speed = meter.all_means(self.accelerator), throughput.per_second()
        run.require_finite(step, training.loss, self.model.state_dict().values())
        meter.reset()
        epoch = step // self.steps
        means = {"train_loss": training.loss, "train_accuracy": training.accuracy}
        means["examples_per_second"] = round(speed, 1)
        self.broadcast_buffers()
        with self.as_divergence(run, step), self.exact():
            measured = self.measure(run, epoch)
            self.record = run.log({"kind": "epoch", "step": step, "epoch": epoch, **means, **measured})
            self.save(run, step, meter)

    @staticmethod
    def gather(entries: list[str]) -> list[str]:
        """Return the entries of all processes."""
        return gather_object(entries)

    def broadcast_buffers(self) -> None:
        """Copy the buffers of process 0 to all processes. Batch norm's running statistics differ between them.

        DistributedDataParallel does this before each step as well, so process 0's checkpoint is enough to resume with
        the same bits.
        """
        broadcast(list(self.model.buffers()))

    def save(self, run: Run, step: int, meter: Meter) -> None:
        """Write a checkpoint. Call it inside `exact()`: the file then holds the schedule's exact value."""
        own = {"meter": meter.reduced(self.accelerator), "steps": self.steps, "record": self.record}
        parts = {part: dataclasses.asdict(fingerprint) for part, fingerprint in self.fingerprints.items()}
        data = {"interface": self.interface.record(), "parts": parts, "networks": self.networks}
        run.save(step, {**self.state(), **own, **data})

    def restore(self, run: Run, meter: Meter) -> int:
        """Load the state of the run's last checkpoint and return its step; 0 if there is none."""
        state = run.restore(self.config.epochs * self.steps)
        if state is None:
            require_shown(self.changed, self.fingerprints, self.networks, {}, run.path)
        else:
            with run.as_damaged_checkpoint(state["step"]):
                self.interface = require_same_interface(self.interface, state, run.path)
                require_same_data(self.fingerprints, self.steps, state, run.path)
                require_same_networks(self.networks, state, run.path)
                require_shown(self.changed, self.fingerprints, self.networks, state, run.path)
                self.load_state(state)
                self.record = state.get("record")
                if self.accelerator.is_main_process:  # the checkpoint holds the sums of all processes
                    meter.totals.copy_(state["meter"])
        run.change_config({name: now for name, (_, now) in self.changed.items()})
        return 0 if state is None else state["step"]

    def state(self) -> dict[str, Any]:
        """Return the state of training for a checkpoint, as tensors and plain values."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned. Raise `UserError` if it belongs to another network."""
        require_same_shapes(self.model.state_dict(), state["model"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.controller is not None:
            with as_user_error(ValueError):  # the target differs if a file that names it has changed
                self.controller.load_state_dict(state["controller"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def split(batch: Any, number: int) -> list[Any]:
    """Split ``batch``, a tuple of tensors [examples, ...] or None, into ``number`` equal parts."""
    if number == 1:
        return [batch]
    columns = [[None] * number if entry is None else entry.chunk(number) for entry in batch]
    return list(zip(*columns, strict=True))
