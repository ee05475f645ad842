"""Train a convolutional network to an exact sparsity or FLOP budget: python cnn/train.py [RECIPE] [OPTIONS]."""

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from str_triton import Budget, SparsityController, count, densify, parameter_groups, refresh_batch_norm
from str_triton.cnn.checks import check_images, check_inputs, has_checkpoint
from str_triton.cnn.config import RESUME_MAY_CHANGE, RESUME_MAY_MOVE, Config
from str_triton.cnn.data import Data, batches, load, steps_per_epoch
from str_triton.cnn.methods import Masked, prepare
from str_triton.cnn.models import build
from str_triton.cnn.pretrained import start_from
from str_triton.cnn.published import PUBLISHED
from str_triton.cnn.recipes import RECIPES, recipe_for, resolve
from str_triton.cnn.teacher import divergence, read_teacher
from str_triton.cnn.training_schedule import announce_pruning, learning_rate
from str_triton.files import percent, printable, with_sorted_header
from str_triton.training.command_line import CommandLine
from str_triton.training.errors import as_too_large, as_user_error
from str_triton.training.fingerprint import hash_of_network
from str_triton.training.interface import INTERFACE
from str_triton.training.loop import Accelerator, Loop, StepOutput
from str_triton.training.meter import Means, Meter
from str_triton.training.metrics import Record, read_metrics
from str_triton.training.opening import number
from str_triton.training.report import report
from str_triton.training.run import Run

PROGRAM = "train-cnn"
PURPOSE = "Train a convolutional network to an exact sparsity or FLOP budget."
COMMAND_LINE = CommandLine(
    PROGRAM, PURPOSE, RECIPES, recipe_for, RESUME_MAY_CHANGE, resolve, PUBLISHED, RESUME_MAY_MOVE
)
REFRESH_BATCHES = 20  # batches from which batch norm's statistics are recomputed (docs/exact-budgets.md)


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""
    return Experiment.main(COMMAND_LINE, args)


@dataclass(kw_only=True)
class Experiment(Loop):
    """The training of a network on images.

    Attributes:
        corrupt: a line about each image that this process has skipped in the epoch.
        example: an input of the model.
        budget: the model's budget when last counted.
        teacher: a trained network whose scores are learned too; None without --teacher.
    """

    config: Config
    controller: SparsityController | Masked | None
    data: Data
    corrupt: list[str]
    example: Tensor
    budget: Budget
    teacher: nn.Module | None

    @classmethod
    def prepare(cls, config: Config, accelerator: Accelerator) -> "Experiment":
        with as_user_error(ValueError, OSError):
            check_inputs(config)
            corrupt: list[str] = []
            on_corrupt = corrupt.append if config.skip_corrupt else None
            data = load(config.data, config.data_dir, on_corrupt, config.image_size)
            steps = steps_per_epoch(data.train, config.batch_size, drop_last=True, world_size=accelerator.num_processes)
            torch.manual_seed(config.seed)
            model = initial_model(config, data)
            model.to(accelerator.device, memory_format=memory_format(config))
            example = torch.zeros(1, *data.image_shape, device=accelerator.device)
            check_images(config, model, example, accelerator.num_processes)
            teacher = None if config.teacher is None else read_teacher(config.teacher, data.interface())
            if teacher is not None:
                teacher.to(accelerator.device, memory_format=memory_format(config))
            budget = count(model, example)
            controller = prepare(config, model, example)
        if config.method == "str":
            announce_pruning(config, steps)
        groups = parameter_groups(model, config.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        if isinstance(controller, Masked):
            controller.attach(optimizer)
        network, optimizer = accelerator.prepare(model, optimizer)
        if config.compile:
            network = torch.compile(network)
        return cls(
            config=config,
            accelerator=accelerator,
            steps=steps,
            model=model,
            network=network,
            optimizer=optimizer,
            interface=data.interface(),
            fingerprints={"training": data.train.fingerprint(), "test": data.test.fingerprint()},
            controller=controller,
            data=data,
            corrupt=corrupt,
            example=example,
            budget=budget,
            networks={} if teacher is None else {"teacher": hash_of_network(teacher)},
            teacher=teacher,
        )

    def facts(self) -> dict[str, str]:
        train, test = number(len(self.data.train), "training image"), number(len(self.data.test), "test image")
        shape = "x".join(map(str, self.data.image_shape))
        return {
            "data": f"{self.config.data}: {train}, {test}, {shape}, {self.data.num_classes} classes",
            "model": f"{self.config.model}: {number(self.budget.params, 'weight')}",
            **({"weights": f"from {self.config.pretrained}"} if self.config.pretrained else {}),
            **({"teacher": self.config.teacher} if self.config.teacher else {}),
            "target": target_text(self.config),
        }

    def batches(self, epoch: int, start: int, *, training: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        layout = memory_format(self.config)
        with as_user_error(ValueError, OSError):
            for images, labels in batches(
                self.data.train if training else self.data.test,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                epoch=epoch,
                augment=training,
                shuffle=training,
                workers=self.config.workers,
                start=start,
                drop_last=training,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                device=self.accelerator.device,
                on_corrupt=self.corrupt.append if self.config.skip_corrupt else None,
            ):
                yield images.contiguous(memory_format=layout), labels

    def forward(self, batch: tuple[Tensor, Tensor]) -> StepOutput:
        images, labels = batch
        outputs = self.network(images)
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.config.label_smoothing)
        if self.teacher is not None:
            assert self.config.teacher_share is not None  # resolved with the teacher
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(images)
            loss = loss.lerp(divergence(outputs, taught), self.config.teacher_share)
        return StepOutput(loss, outputs, labels)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config, self.steps, step)

    @torch.no_grad()
    def evaluate(self) -> Means:
        """Return loss and accuracy on the test images."""
        self.model.eval()
        meter = Meter(self.accelerator.device)
        for images, labels in self.batches(0, 0, training=False):
            if len(labels) > 0:  # a small last batch may be empty in some processes
                outputs = self.model(images)
                meter.add(F.cross_entropy(outputs, labels), outputs, labels)
        return meter.all_means(self.accelerator)

    def refresh_batch_norm(self, epoch: int) -> None:
        """Recompute the running statistics of batch norm for the present weights.

        Each process computes them from its own part of the batches, and all processes get the mean.
        """
        buffers = self.model.named_buffers()
        statistics = [buffer for name, buffer in buffers if name.endswith(("running_mean", "running_var"))]
        if not statistics:
            return
        refresh_batch_norm(self.model, islice(self.batches(epoch, 0), REFRESH_BATCHES))
        torch._foreach_copy_(statistics, self.accelerator.reduce(statistics, "mean"))

    def measure(self, run: Run, epoch: int) -> Record:
        self.refresh_batch_norm(epoch)
        test = self.evaluate()
        run.require_finite(epoch * self.steps, test.loss)
        self.budget = count(self.model, self.example)
        run.write_budget(self.budget)
        return {
            "loss": test.loss,
            "accuracy": test.accuracy,
            **{key: getattr(self.budget, key) for key in ("sparsity", "nonzeros", "flops")},
            **({"corrupt": self.report_corrupt(run, epoch)} if self.config.skip_corrupt else {}),
            "layers": {r.name: {"sparsity": r.sparsity, "threshold": r.threshold} for r in self.budget.rows},
        }

    def report_corrupt(self, run: Run, epoch: int) -> int:
        """Print the images that any process has skipped in the epoch and its test, and return their number."""
        lines = sorted(set(self.gather(self.corrupt)))
        self.corrupt.clear()
        for line in lines:
            run.say(f"skipped in epoch {epoch}: {printable(line)}")
        return len(lines)

    def state(self) -> dict[str, Any]:
        own = {"corrupt": self.gather(self.corrupt)} if self.config.skip_corrupt else {}
        return super().state() | own

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.corrupt[:] = state.get("corrupt", [])
        with self.exact():
            self.budget = count(self.model, self.example)

    def status(self, epoch: int, means: Means) -> str:
        return (
            f"epoch {epoch + 1}/{self.config.epochs}  loss {means.loss:.3f}  accuracy {100 * means.accuracy:.1f} %  "
            f"{self.pruned_text()}"
        )

    def pruned_text(self) -> str:
        """Return the sparsity or FLOPs that the schedule asks for now. Without a schedule return the last count's."""
        if self.controller is not None:
            scheduled = self.controller.scheduled()
            if "flops_share" in scheduled:
                return f"FLOPs {percent(scheduled['flops_share'])} of dense"
            return f"sparsity {percent(scheduled['sparsity'])}"
        counted = 0 if self.record is None else self.record["epoch"]
        when = f" after epoch {counted}" if self.config.method == "str" else ""
        return f"sparsity {percent(self.budget.sparsity)}{when}"

    def finish(self, run: Run) -> None:
        """Write summary.json, interface.json, the plain model and the report, and print the budget."""
        run.end_training()
        if not self.accelerator.is_main_process:
            return
        last, budget = read_metrics(run.path)[-1], self.budget
        run.write_budget(budget)
        summary = {
            "accuracy": last["accuracy"],
            **{key: getattr(budget, key) for key in ("sparsity", "nonzeros", "params", "flops", "dense_flops")},
            "epochs": self.config.epochs,
            "seconds": last["seconds"],
            "seed": self.config.seed,
            "recipe": self.config.recipe,
        }
        run.write("summary.json", json.dumps(summary, indent=2) + "\n")
        self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)  # otherwise the copy contains autocast
        with self.exact():  # the network that was measured, and that the last checkpoint holds
            weights = densify(copy.deepcopy(self.model)).state_dict()
        run.write(INTERFACE, self.interface.text())
        content = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
        metadata = {"format": "pt", "model": self.config.model, **self.interface.texts()}
        run.write("model.safetensors", with_sorted_header(safetensors.torch.save(content, metadata)))
        run.write("report.html", report(run.path))
        run.say(str(budget))
        run.say(
            f"accuracy {100 * summary['accuracy']:.2f} %  sparsity {percent(budget.sparsity)}  "
            f"FLOPs {percent(budget.flops / budget.dense_flops)} of dense  {summary['seconds']:.0f} s"
        )
        run.say(f"report: {run.path / 'report.html'}")


def target_text(config: Config) -> str:
    """Return the method and its target in words."""
    if config.target_sparsity is not None:
        target = f"sparsity {percent(config.target_sparsity)}"
    elif config.target_flops is not None:
        target = f"FLOPs {percent(config.target_flops)} of dense"
    elif config.budget is not None:
        target = f"the sparsity of each layer in {config.budget}"
    else:
        return f"none ({config.method})"
    return f"{target} ({config.method}{f', distribution {config.distribution}' if config.distribution else ''})"


def initial_model(config: Config, data: Data) -> nn.Module:
    """Return the network to start from, on the CPU. A resumed run later loads the weights of its checkpoint into it.

    Raises as `build` and `start_from` do.
    """
    in_channels = data.image_shape[0]
    with as_too_large(f"--model {config.model}"):
        model = build(config.model, num_classes=data.num_classes, in_channels=in_channels)
    if config.pretrained is not None and not has_checkpoint(config):
        class_names = None if config.new_classifier else data.class_names
        start_from(config.pretrained, model, config.model, in_channels, class_names=class_names)
    return model


def memory_format(config: Config) -> torch.memory_format:
    """Return the memory format of images and of the weights of convolutions."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


if __name__ == "__main__":
    sys.exit(main())
