"""Train a recurrent network with a learned rank that meets an exact target: python rnn/train.py [RECIPE] [OPTIONS]."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from str_triton import LowRankWeight, RankBudget, count_ranks
from str_triton.files import with_sorted_header
from str_triton.rnn.baselines import given_ranks, svd_ranks
from str_triton.rnn.data import load, words_of
from str_triton.rnn.finished_run import interface_of
from str_triton.rnn.methods import END, build, make_optimizer, rank_target, target_text
from str_triton.rnn.models import Architecture, architecture_of, compact, copy_weights
from str_triton.rnn.recipes import (
    PUBLISHED,
    RECIPES,
    RESUME_MAY_CHANGE,
    RESUME_MAY_MOVE,
    Config,
    recipe_for,
    resolve,
)
from str_triton.rnn.tasks import Task, make_task
from str_triton.training.command_line import CommandLine
from str_triton.training.errors import as_too_large, as_user_error
from str_triton.training.interface import INTERFACE, Interface
from str_triton.training.loop import Accelerator, Loop, StepOutput
from str_triton.training.meter import Means
from str_triton.training.metrics import Record
from str_triton.training.opening import number
from str_triton.training.report import report
from str_triton.training.run import Run
from str_triton.training.schedules import warmup_cosine

PROGRAM = "train-rnn"
PURPOSE = "Train a recurrent network with a learned rank that meets an exact target."
COMMAND_LINE = CommandLine(
    PROGRAM, PURPOSE, RECIPES, recipe_for, RESUME_MAY_CHANGE, resolve, PUBLISHED, RESUME_MAY_MOVE
)
SETTLED = 0.9  # fraction of training after which the ranks of --method str count as final
SPECTRUM = 64  # the maximum number of singular values of a matrix in the metrics of an epoch


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""
    return Experiment.main(COMMAND_LINE, args)


@dataclass(kw_only=True)
class Experiment(Loop):
    """A training run of a recurrent network.

    Attributes:
        task: the task and its data.
        architecture: the network's architecture; the method decides the ranks.
        budget: the network's cost at the last count.
        cut_ranks: with --method svd-finetune, the ranks after the cut, None before it.
        best: the best epoch so far: its number, its validation metric and the model's state.
    """

    config: Config
    task: Task
    architecture: Architecture
    budget: RankBudget
    cut_ranks: dict[str, int] | None = None
    best: dict[str, Any] | None = None

    @classmethod
    def prepare(cls, config: Config, accelerator: Accelerator) -> "Experiment":
        with as_user_error(ValueError, OSError):
            data = load(
                config.data,
                task=config.task,
                seed=config.data_seed,
                words=None if config.words is None else words_of(config.words),
                classes=config.classes,
                noise=config.noise,
                device=accelerator.device,
                cache_dir=config.cache_dir,
            )
            task = make_task(config, data, accelerator)
            architecture = architecture_of(dataclasses.asdict(config), task.inputs, task.outputs)
            torch.manual_seed(config.seed)
            with as_too_large(f"--hidden-size {config.hidden_size}"):
                model, controller = build(config, architecture)
        model.to(accelerator.device)
        network, optimizer = accelerator.prepare(model, make_optimizer(config, model))
        return cls(
            config=config,
            accelerator=accelerator,
            steps=task.steps,
            model=model,
            network=network,
            optimizer=optimizer,
            interface=interface_of(task.data),
            fingerprints=task.fingerprints(),
            controller=controller,
            max_norm=config.max_norm or None,
            task=task,
            architecture=architecture,
            budget=count_ranks(model),
        )

    def facts(self) -> dict[str, str]:
        config = self.config
        layers = f"{number(config.layers, 'layer')} of {config.hidden_size} units"
        ways = " in both directions" if config.bidirectional else ""
        size = f"{self.budget.dense_params:,} parameters when dense"
        return {
            "data": f"{self.task.data.name}: {self.task.sizes()}",
            "model": f"{config.cell}, {layers}{ways}: {size}",
            "target": target_text(config),
        }

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        with as_user_error(ValueError, OSError):
            yield from self.task.batches(epoch, start)

    def forward(self, batch: Any) -> StepOutput:
        return self.task.forward(self.network, batch)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config, self.steps, step)

    def begin_epoch(self, epoch: int) -> None:
        if self.config.method == "svd-finetune" and self.cut_ranks is None and epoch >= cut_epoch(self.config):
            with as_user_error(ValueError):
                if self.config.ranks is None:
                    ranks = svd_ranks(self.model, self.architecture, rank_target(self.config))
                else:
                    ranks = given_ranks(self.architecture.build(), self.config.ranks)
            self.cut(ranks)

    def cut(self, ranks: dict[str, int]) -> None:
        """Replace the dense matrices by their ``ranks`` largest singular components, and make a new optimizer."""
        self.accelerator.free_memory()  # releases the dense network's optimizer
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn here, and once more in a resumed run
            model = self.architecture.build(ranks=ranks).to(self.accelerator.device)
        copy_weights(self.model, model)
        self.model, self.cut_ranks = model, ranks
        self.network, self.optimizer = self.accelerator.prepare(model, make_optimizer(self.config, model))

    def measure(self, run: Run, epoch: int) -> Record:
        validation = self.task.evaluate(self.model, "validation")
        run.require_finite(epoch * self.steps, validation.loss)
        self.budget = count_ranks(self.model)
        run.write_budget(self.budget)
        figure = self.task.value(validation)
        self.keep_if_best(epoch, figure)
        return {
            "loss": validation.loss,
            "accuracy": validation.accuracy,
            self.task.figure: figure,
            "total_rank": self.budget.total_rank,
            "params": self.budget.params,
            "layers": {
                row.name: {
                    "rank": row.rank,
                    "threshold": row.threshold,
                    "spectrum": downsample(self.model.get_submodule(row.name).singular_values()),
                }
                for row in self.budget.rows
            },
        }

    def keep_if_best(self, epoch: int, figure: float) -> None:
        """Keep a copy of the model if its epoch may be chosen and no earlier one is better."""
        if epoch < first_candidate(self.config):
            return
        worse = self.best is not None and self.task.sign * (figure - self.best["figure"]) < 0
        if self.config.choose == "validation" and worse:
            return
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.best = {"epoch": epoch, "figure": figure, "model": state}

    def state(self) -> dict[str, Any]:
        own = {"cut_ranks": self.cut_ranks, "best": self.best, "carried": self.task.state()}
        return super().state() | own

    def load_state(self, state: dict[str, Any]) -> None:
        if state["cut_ranks"] is not None:
            self.cut(state["cut_ranks"])
        super().load_state(state)
        self.best = state["best"]
        self.task.load_state(state["carried"])
        self.budget = count_ranks(self.model)

    def status(self, epoch: int, means: Means) -> str:
        text = self.task.text(self.task.value(means))
        # Not `count_ranks`, which counts all parameters: this is called several times a second.
        ranks = [module.rank for module in self.model.modules() if isinstance(module, LowRankWeight)]
        return f"epoch {epoch + 1}/{self.config.epochs}  loss {means.loss:.3f}  {text}{rank_text(ranks)}"

    def finish(self, run: Run) -> None:
        """Test the chosen epoch's model, write the run's results and print its metric and cost."""
        self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)  # so that the copy has no autocast wrapper
        self.model.load_state_dict(self.best["model"])
        self.budget = budget = count_ranks(self.model)
        small = compact(self.model)
        with self.accelerator.autocast():
            figure = self.task.value(self.task.evaluate(small, "test"))
        seconds = round(run.elapsed(), 3)
        run.end_training()
        if not self.accelerator.is_main_process:
            return
        run.write_budget(budget)
        name, chosen = self.task.figure, self.config.choose == "validation"
        summary = {
            name: figure,
            f"validation_{name}": self.best["figure"] if chosen else None,
            "ranks": {row.name: row.rank for row in budget.rows},
            "params": budget.params,
            "dense_params": budget.dense_params,
            "epochs": self.config.epochs,
            "chosen_epoch": self.best["epoch"],
            "seconds": seconds,
            "seed": self.config.seed,
            "recipe": self.config.recipe,
        }
        run.write("summary.json", json.dumps(summary, indent=2) + "\n")
        run.write("data.json", json.dumps({"name": self.task.data.name, **self.task.data.notes}, indent=2) + "\n")
        run.write(INTERFACE, self.interface.text())
        run.write("model.safetensors", to_safetensors(small, self.architecture, self.interface))
        run.write("report.html", report(run.path))
        run.say(str(budget))
        run.say(
            f"{self.task.text(figure)}{rank_text([row.rank for row in budget.rows])}  parameters {budget.params:,} of "
            f"{budget.dense_params:,} ({100 * budget.params / budget.dense_params:.1f} % of dense)  {seconds:.0f} s"
        )
        run.say(f"report: {run.path / 'report.html'}")


def cut_epoch(config: Config) -> int:
    """Return the number of epochs before the cut of --method svd-finetune."""
    return config.epochs // 2


def first_candidate(config: Config) -> int:
    """Return the first epoch that may be chosen: from there on the target holds, or the ranks of str are final."""
    fraction = {"str-exact": END, "str": SETTLED}.get(config.method, 0.0)
    if config.method == "svd-finetune":
        return cut_epoch(config) + 1
    return -int(-fraction * config.epochs // 1)


def learning_rate(config: Config, steps: int, step: int) -> float:
    """Return the learning rate of step number ``step``, from 0: the schedule in the middle of the step.

    The middle keeps the last step's rate above zero.
    """
    begin, end = 0, config.epochs
    if config.method == "svd-finetune":
        cut = cut_epoch(config)
        begin, end = (0, cut) if step < cut * steps else (cut, end)
    progress = (step + 0.5 - begin * steps) / ((end - begin) * steps)
    if config.lr_schedule == "step":
        return config.lr * (1.0 if progress < 2 / 3 else 0.1)
    return config.lr * warmup_cosine(progress, min(1.0, config.warmup_epochs / (end - begin)))


def rank_text(ranks: Sequence[int]) -> str:
    """Return the total of the matrices' ranks as the end of a status line, or "" where all matrices are dense."""
    return f"  rank {sum(ranks)}" if ranks else ""


def downsample(values: Tensor) -> list[float]:
    """Return at most SPECTRUM evenly spaced values, from largest to smallest, with four digits."""
    ordered = values.sort(descending=True).values
    indices = torch.linspace(0, len(ordered) - 1, min(len(ordered), SPECTRUM)).round().long()
    return [float(f"{value:.4g}") for value in ordered.cpu()[indices].tolist()]


def to_safetensors(model: nn.Module, architecture: Architecture, interface: Interface) -> bytes:
    """Return the compact model's weights as safetensors, with the sizes that `load_trained` needs and the interface."""
    sizes = {"inputs": architecture.inputs, "outputs": architecture.outputs, "ranks": model.rnn.ranks()}
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    metadata = {"network": json.dumps(sizes), **interface.texts()}
    return with_sorted_header(safetensors.torch.save(weights, metadata))


if __name__ == "__main__":
    sys.exit(main())
