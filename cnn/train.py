"""Train a convolutional network to an exact sparsity or FLOP budget: python cnn/train.py [RECIPE] [OPTIONS]."""

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from str_triton import Budget, count, densify, parameter_groups, refresh_batch_norm
from str_triton.cnn.data import Data, batches, load, steps_per_epoch
from str_triton.cnn.methods import Masked, prepare
from str_triton.cnn.methods.budget_file import named_sparsities
from str_triton.cnn.models import build, single_value_norms, state_shapes
from str_triton.cnn.pretrained import check_start, start_from
from str_triton.cnn.published import PUBLISHED
from str_triton.cnn.recipes import FINETUNING, RECIPES, RESUME_MAY_CHANGE, Config, recipe_for, resolve
from str_triton.files import percent, printable, with_sorted_header
from str_triton.training.checkpoints import Checkpoints
from str_triton.training.command_line import CommandLine
from str_triton.training.errors import UserError, as_user_error, one_line, tell, warn
from str_triton.training.interface import INTERFACE
from str_triton.training.loop import Accelerator, Loop, StepOutput
from str_triton.training.meter import Means, Meter
from str_triton.training.metrics import Record, read_metrics
from str_triton.training.report import report
from str_triton.training.run import Run
from str_triton.training.schedules import decayed_thresholds, warmup_cosine

PROGRAM = "train-cnn"
PURPOSE = "Train a convolutional network to an exact sparsity or FLOP budget."
COMMAND_LINE = CommandLine(PROGRAM, PURPOSE, RECIPES, recipe_for, RESUME_MAY_CHANGE, resolve, PUBLISHED)
REFRESH_BATCHES = 20  # batches from which batch norm's statistics are recomputed (docs/exact-budgets.md)
EFFECTIVE = -10.0  # above this raw threshold the threshold is 5e-5 or more, and its gradient moves it as well


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
    """

    config: Config
    data: Data
    corrupt: list[str]
    example: Tensor
    budget: Budget

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
            controller=controller,
            data=data,
            corrupt=corrupt,
            example=example,
            budget=budget,
        )

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
            f"sparsity {percent(self.budget.sparsity)}"
        )

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
        weights = densify(copy.deepcopy(self.model)).state_dict()
        interface = self.data.interface()
        run.write(INTERFACE, interface.text())
        content = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
        metadata = {"format": "pt", "model": self.config.model, **interface.texts()}
        run.write("model.safetensors", with_sorted_header(safetensors.torch.save(content, metadata)))
        run.write("report.html", report(run.path))
        run.say(str(budget))
        run.say(
            f"accuracy {100 * summary['accuracy']:.2f} %  sparsity {percent(budget.sparsity)}  "
            f"FLOPs {percent(budget.flops / budget.dense_flops)} of dense  {summary['seconds']:.0f} s"
        )
        run.say(f"report: {run.path / 'report.html'}")


def check_inputs(config: Config) -> None:
    """Check all files and names that a run needs, except its images, whose reading takes longer.

    Raises as `build`, `check_start` and `named_sparsities` do, and `UserError` if the recipe needs data or a trained
    network and none is named.
    """
    if not config.data:
        raise UserError(f"{config.recipe} needs your images: name them with --data imagefolder:DIR or hub:DIR")
    state_shapes(config.model, 2, 1)
    if config.pretrained is None and config.recipe in FINETUNING:
        raise UserError(f"{config.recipe} starts from a trained dense network: name it with --pretrained FILE")
    if config.pretrained is not None and not has_checkpoint(config):
        check_start(config.pretrained, needs_zeros=config.method == "keep-zeros")
    if config.budget is not None:
        named_sparsities(config.budget)


def check_images(config: Config, model: nn.Module, example: Tensor, processes: int) -> None:
    """Raise `ValueError` if the network does not take images of this size, or if batch norm would get a single value.

    Batch norm needs at least two values per channel. It gets one from a single image whose size there is 1 x 1.
    """
    height, width = example.shape[2:]
    try:
        norms = single_value_norms(model, example)
    except (RuntimeError, ValueError, AssertionError) as error:  # timm's networks raise these
        raise ValueError(f"--model {config.model}: images of {width}x{height} pixels: {one_line(error)}") from error
    if norms and config.batch_size == processes * config.accumulate:
        part = f" and --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise ValueError(
            f"--batch-size {config.batch_size}{part}: with one image of {width}x{height} pixels at a time, the batch "
            f"norm {norms[0]!r} of {config.model} gets one value per channel; use at least two images at a time"
        )


def initial_model(config: Config, data: Data) -> nn.Module:
    """Return the network to start from, on the CPU. A resumed run later loads the weights of its checkpoint into it.

    Raises as `build` and `start_from` do.
    """
    in_channels = data.image_shape[0]
    model = build(config.model, num_classes=data.num_classes, in_channels=in_channels)
    if config.pretrained is not None and not has_checkpoint(config):
        start_from(config.pretrained, model, config.model, in_channels, new_classifier=config.new_classifier)
    return model


def has_checkpoint(config: Config) -> bool:
    """Return whether the run resumes from a checkpoint. Then the file of --pretrained is not needed and may be gone."""
    return config.resume and bool(Checkpoints(Path(config.run_dir) / "checkpoints").steps())


def memory_format(config: Config) -> torch.memory_format:
    """Return the memory format of images and of the weights of convolutions."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def learning_rate(config: Config, steps: int, step: int) -> float:
    """Return the learning rate of step number ``step``, counted from 0: the schedule at the middle of the step.

    The paper's schedule, epoch-cosine, is constant within an epoch. During warmup it takes the schedule's value at the
    epoch's end, later the value at the epoch's beginning.
    """
    progress = (step + 0.5) / (config.epochs * steps)
    if config.lr_schedule == "epoch-cosine":
        epoch = step // steps
        progress = (epoch + 1 if epoch < config.warmup_epochs else epoch) / config.epochs
    return config.lr * warmup_cosine(progress, config.warmup_epochs / config.epochs)


def pruning_start(config: Config, steps: int) -> tuple[int | None, float]:
    """Predict the epoch in which pruning starts. Until then only weight decay moves a very negative raw threshold.

    Returns:
        The epoch, counted from 1, or None if pruning does not start; and the raw threshold then, or at the end.
    """
    rates = (learning_rate(config, steps, step) for step in range(config.epochs * steps))
    start = end = config.raw_threshold_init
    for step, end in enumerate(decayed_thresholds(start, rates, config.weight_decay, config.momentum)):
        if end > EFFECTIVE:
            return step // steps + 1, end
    return None, end


def announce_pruning(config: Config, steps: int) -> None:
    """Print in which epoch pruning will start, or warn that it will not."""
    epoch, end = pruning_start(config, steps)
    if epoch is None:
        warn(
            f"nothing will be pruned: weight decay moves the raw thresholds from {config.raw_threshold_init:g} to "
            f"{end:.4g} in {config.epochs} epochs, and pruning starts above {EFFECTIVE:g}; "
            "train longer, or raise --weight-decay or --raw-threshold-init"
        )
    elif config.raw_threshold_init < EFFECTIVE:
        tell(
            f"pruning will start in epoch {epoch} of {config.epochs}, when weight decay has moved the raw thresholds "
            f"from {config.raw_threshold_init:g} to {EFFECTIVE:g}"
        )


if __name__ == "__main__":
    sys.exit(main())
