"""The epoch loop that the training programs share: steps, logs, checkpoints, signals, and resuming bit for bit."""

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.linalg import LinAlgError

from str_triton.training.command_line import CommandLine
from str_triton.training.config import TrainConfig, check_parts, make_accelerator
from str_triton.training.errors import UserError, as_user_error
from str_triton.training.job import first_process_speaks, run_job
from str_triton.training.meter import Means, Meter, Throughput
from str_triton.training.metrics import Record
from str_triton.training.run import Run
from str_triton.training.run_folder import RunFolder, default_run_dir

LOG_STEPS = 50


class Controller(Protocol):
    """What drives thresholds to a target: a SparsityController or a RankController."""

    def step(self, progress: float) -> None:
        """After each optimizer step, with the share of training that is done."""

    def exact(self) -> AbstractContextManager:
        """Where the schedule's value holds exactly; training is not touched."""

    def state_dict(self) -> dict[str, Any]:
        """What to go on with."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with `state_dict()`."""


class StepOutput(NamedTuple):
    """What a batch gives: its mean loss, scores [N, classes] and labels [N]."""

    loss: Tensor
    outputs: Tensor
    labels: Tensor


@dataclass(kw_only=True)
class Loop(ABC):
    """A model in training. Programs say what a batch is, what it gives, and what an epoch is measured by.

    Attributes:
        config, accelerator: the run's options; device, precision and processes.
        steps: optimizer steps in an epoch.
        model, network: the model, and the same as several processes share it.
        optimizer, controller: of the model; no controller where nothing is driven to a target.
        max_norm: the gradient's norm is cut to this, where it is not None.
        record: what the metrics hold of the last epoch; None in the first.
    """

    config: TrainConfig
    accelerator: Accelerator
    steps: int
    model: nn.Module
    network: nn.Module
    optimizer: AcceleratedOptimizer
    controller: Controller | None
    max_norm: float | None = None
    record: Record | None = None

    @classmethod
    @abstractmethod
    def prepare(cls, config: TrainConfig, accelerator: Accelerator) -> Self:
        """Read the data and build model, controller and optimizer. Raises `UserError` for what they cannot take."""

    @classmethod
    def main(cls, command_line: CommandLine, args: Sequence[str] | None = None) -> int:
        """Train as ``args`` (default: those of the process) say, and return the program's exit code."""
        return run_job(partial(cls._main, command_line, sys.argv[1:] if args is None else list(args)))

    @classmethod
    def _main(cls, command_line: CommandLine, args: Sequence[str]) -> None:
        # Nothing is written before all that can be wrong with the arguments has been looked at.
        with first_process_speaks():
            config = command_line.read(args)
        accelerator = make_accelerator(config)
        check_parts(config, accelerator.num_processes)
        run_dir, plain = config.run_dir or default_run_dir(config.recipe), dataclasses.asdict(config)
        if accelerator.is_main_process:
            RunFolder.check(run_dir, resume=config.resume)
        experiment = cls.prepare(config, accelerator)
        with Run.open(accelerator, plain, run_dir, resume=config.resume, program=command_line.program) as run:
            experiment.train(run)
            experiment.finish(run)

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """This process's part of an epoch's batches from number ``start`` on, on the device."""

    @abstractmethod
    def forward(self, batch: Any) -> StepOutput:
        """What the network makes of a training batch, or of a part of one."""

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """The learning rate of the step after ``step`` others."""

    @abstractmethod
    def measure(self, run: Run, epoch: int) -> Record:
        """Evaluate after ``epoch`` epochs, write the budget, and return what else the metrics hold of the epoch.

        Called at the schedule's exact value. Checks with ``run.require_finite`` what it has measured.
        """

    @abstractmethod
    def status(self, epoch: int, means: Means) -> str:
        """The progress bar's text, with the means of the epoch so far."""

    @abstractmethod
    def finish(self, run: Run) -> None:
        """After the last epoch: write what is left of the run, and print the result."""

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027 (most programs have nothing to do then)
        """Called before an epoch's first step, and when a run is resumed within the epoch."""

    def train(self, run: Run) -> None:
        """Train from wherever the run stands to the last epoch, with a checkpoint and a budget at every epoch's end."""
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
        """One step of the optimizer; ``meter`` counts what the batch gave."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = split(batch, self.config.accumulate)
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)  # the processes' gradients meet in the last backward alone
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
        """Turn what a block raises because of weights that are NaN, infinite or close to it into a `UserError`."""
        try:
            yield
        except (ArithmeticError, RuntimeError, ValueError) as error:
            run.require_finite(step, 0.0, self.model.state_dict().values())
            if isinstance(error, LinAlgError):
                raise run.diverged(step, "the weights became too large for their singular values") from error
            raise

    def exact(self) -> AbstractContextManager:
        """Where the schedule's value holds exactly: for evaluating and saving. Training is not touched."""
        return nullcontext() if self.controller is None else self.controller.exact()

    def log_step(self, run: Run, step: int, meter: Meter) -> None:
        """Loss and accuracy of the epoch so far."""
        means = meter.all_means(self.accelerator)
        run.require_finite(step, means.loss)
        rate = self.learning_rate(step - 1)
        run.log({"kind": "step", "step": step, "lr": rate, "loss": means.loss, "accuracy": means.accuracy})

    def maybe_checkpoint(self, run: Run, step: int, meter: Meter) -> None:
        """Within an epoch: save where it is time to, and leave where the run was asked to."""
        stopping = run.stopping(step)
        if stopping or step % self.config.checkpoint_steps == 0:
            run.require_finite(step, meter.all_means(self.accelerator).loss, self.model.state_dict().values())
            with self.as_divergence(run, step), self.exact():
                self.save(run, step, meter)
        if stopping:
            run.leave(step)

    def end_epoch(self, run: Run, step: int, meter: Meter, throughput: Throughput) -> None:
        """Measure, and write metrics and checkpoint, all at the schedule's exact value."""
        training, speed = meter.all_means(self.accelerator), throughput.per_second()
        run.require_finite(step, training.loss, self.model.state_dict().values())
        meter.reset()
        epoch = step // self.steps
        means = {"train_loss": training.loss, "train_accuracy": training.accuracy}
        means["examples_per_second"] = round(speed, 1)
        self.share_buffers()
        with self.as_divergence(run, step), self.exact():
            measured = self.measure(run, epoch)
            self.record = run.log({"kind": "epoch", "step": step, "epoch": epoch, **means, **measured})
            self.save(run, step, meter)

    def share_buffers(self) -> None:
        """Give all processes the buffers of process 0: a batch norm's running statistics are those of its share.

        Each training step begins so too, which is why a checkpoint of process 0's is enough to go on in the same bits.
        """
        broadcast(list(self.model.buffers()))

    def save(self, run: Run, step: int, meter: Meter) -> None:
        """Write a checkpoint; to be called at the schedule's exact value, which is then what the file holds."""
        own = {"meter": meter.reduced(self.accelerator), "steps": self.steps, "record": self.record}
        run.save(step, {**self.state(), **own})

    def restore(self, run: Run, meter: Meter) -> int:
        """Put the state of the run's last checkpoint back and return its step; 0 at the beginning."""
        state = run.restore(self.config.epochs * self.steps)
        if state is None:
            return 0
        step = state["step"]
        with run.as_damaged_checkpoint(step):
            if state.get("steps", self.steps) != self.steps:
                raise ValueError(f"an epoch of it has {state['steps']} steps, here {self.steps}: other data")
            self.load_state(state)
            self.record = state.get("record")
            if self.accelerator.is_main_process:  # the sums of all processes
                meter.totals.copy_(state["meter"])
        return step

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the training; tensors and plain values."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned. Raises `UserError` where it was another network's."""
        require_same_shapes(self.model.state_dict(), state["model"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.controller is not None:
            with as_user_error(ValueError):  # another target, from a file that has changed since
                self.controller.load_state_dict(state["controller"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def require_same_shapes(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise `UserError` that names the first tensor by which a checkpoint's state dict does not fit the network's."""
    for key in (*own, *saved):
        now, then = (list(state[key].shape) if key in state else "not there" for state in (own, saved))
        if now != then:
            raise UserError(
                f"the checkpoint is of another network: the shape of {key} is {then} in it, here {now}; "
                "go on with the data that the run began with"
            )


def split(batch: Any, number: int) -> list[Any]:
    """``batch``, a tuple of tensors [examples, ...] (or None), in ``number`` equal parts."""
    if number == 1:
        return [batch]
    columns = [[None] * number if entry is None else entry.chunk(number) for entry in batch]
    return list(zip(*columns, strict=True))
