"""Train a recurrent network that learns its rank, down to an exact target: python rnn/train.py [RECIPE] [OPTIONS]."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rnn.baselines import common_ranks, svd_ranks
from rnn.data import load
from rnn.finished_run import interface_json
from rnn.models import Architecture, architecture_of, compact, copy_weights
from rnn.recipes import PUBLISHED, RECIPES, RESUME_MAY_CHANGE, TARGETED, Config, recipe_for, resolve
from rnn.tasks import Task, make_task
from str_triton import RankBudget, RankController, RankTarget, count_ranks, parameter_groups
from str_triton.training.command_line import CommandLine
from str_triton.training.errors import as_user_error
from str_triton.training.loop import Loop, StepOutput
from str_triton.training.meter import Means
from str_triton.training.metrics import Record
from str_triton.training.report import report
from str_triton.training.run import Run
from str_triton.training.schedules import warmup_cosine

PROGRAM = "python rnn/train.py"
PURPOSE = "Train a recurrent network that learns its rank, down to an exact target."
COMMAND_LINE = CommandLine(PROGRAM, PURPOSE, RECIPES, recipe_for, RESUME_MAY_CHANGE, resolve, PUBLISHED)
END = 0.5  # share of training after which the target holds; later cuts cost accuracy (docs/learned-rank.md)
SETTLED = 0.9  # share of training after which the ranks of --method str count as final
SPECTRUM = 64  # singular values of a matrix that the metrics hold of an epoch


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: those of the command line) and return its exit code."""
    return Experiment.main(COMMAND_LINE, args)


@dataclass(kw_only=True)
class Experiment(Loop):
    """What is trained, on what.

    Attributes:
        task: the data, and what a step with them is.
        architecture: of the network; its ranks are the method's.
        budget: what the network cost when last counted.
        cut_ranks: with --method svd-finetune, the ranks after the cut; None before.
        best: of the epochs to choose from the best one so far: its number, its validation figure, its model's state.
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
                words=None if config.words is None else tuple(config.words.split(",")),
                classes=config.classes,
                noise=config.noise,
                device=accelerator.device,
                cache_dir=config.cache_dir,
            )
            task = make_task(config, data, accelerator)
            architecture = architecture_of(dataclasses.asdict(config), task.inputs, task.outputs)
            torch.manual_seed(config.seed)
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
            controller=controller,
            max_norm=config.max_norm or None,
            task=task,
            architecture=architecture,
            budget=count_ranks(model),
        )

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
                ranks = svd_ranks(self.model, self.architecture, rank_target(self.config))
            self.cut(ranks)

    def cut(self, ranks: dict[str, int]) -> None:
        """Go on with the ``ranks`` largest singular components of the dense matrices, and a new optimizer."""
        self.accelerator.free_memory()  # which forgets the dense network's optimizer
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, which a resumed run draws once more
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
                    "spectrum": thinned(self.model.get_submodule(row.name).singular_values()),
                }
                for row in self.budget.rows
            },
        }

    def keep_if_best(self, epoch: int, figure: float) -> None:
        """Keep the model where it may be chosen and is not worse than those before it."""
        if epoch < first_candidate(self.config):
            return
        worse = self.best is not None and self.task.sign * (figure - self.best["figure"]) < 0
        if self.config.choose == "validation" and worse:
            return
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.best = {"epoch": epoch, "figure": figure, "model": state}

    def state(self) -> dict[str, Any]:
        own = {"cut_ranks": self.cut_ranks, "best": self.best, "carried": self.task.carried()}
        return super().state() | own

    def load_state(self, state: dict[str, Any]) -> None:
        if state["cut_ranks"] is not None:
            self.cut(state["cut_ranks"])
        super().load_state(state)
        self.best = state["best"]
        self.task.carry(state["carried"])
        self.budget = count_ranks(self.model)

    def status(self, epoch: int, means: Means) -> str:
        text = self.task.text(self.task.value(means))
        return f"epoch {epoch + 1}/{self.config.epochs}  loss {means.loss:.3f}  {text}{rank_text(self.budget)}"

    def finish(self, run: Run) -> None:
        """Test the chosen epoch's model, write it with summary.json and the report, and print what it costs."""
        self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)  # or a copy would drag autocast along
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
        run.write("interface.json", interface_json(self.task.data))
        run.write("model.safetensors", packed(small, self.architecture))
        run.write("report.html", report(run.path))
        run.say(str(budget))
        run.say(
            f"{self.task.text(figure)}{rank_text(budget)}  parameters {budget.params:,} of "
            f"{budget.dense_params:,} ({100 * budget.params / budget.dense_params:.1f} % of dense)  {seconds:.0f} s"
        )
        run.say(f"report: {run.path / 'report.html'}")


def build(config: Config, architecture: Architecture) -> tuple[nn.Module, RankController | None]:
    """The model that the method starts with, and a controller where it drives the ranks to a target.

    Raises ``ValueError`` for a target that cannot be met.
    """
    if config.method == "str":
        return architecture.build(gradient="masked", raw_threshold_init=config.raw_threshold_init), None
    if config.method not in TARGETED:
        return architecture.build(factorize="none"), None
    random = torch.get_rng_state()
    model = architecture.build()
    controller = RankController(model, rank_target(config), end=END)
    if config.method == "str-exact":
        return model, controller
    torch.set_rng_state(random)  # the model above was for the controller's checks alone
    if config.method == "fixed":
        return architecture.build(ranks=common_ranks(model, rank_target(config))), None
    return architecture.build(factorize="none"), None


def rank_target(config: Config) -> RankTarget:
    """What the network is to cost at the end."""
    return RankTarget(total_rank=config.target_rank, params=config.target_params, compression=config.target_compression)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Adam:
    """Adam; what decays, decays as a part of the gradient, as in the paper's formula."""
    thresholds = config.spectrum_decay if config.method == "str" else None
    groups = parameter_groups(model, config.weight_decay, thresholds, spectrum_weight_decay=config.spectrum_decay)
    return torch.optim.Adam(groups, lr=config.lr)


def cut_epoch(config: Config) -> int:
    """The epochs that --method svd-finetune trains the dense network."""
    return config.epochs // 2


def first_candidate(config: Config) -> int:
    """The first epoch that may be chosen: there the target holds, or (--method str) the ranks are about final."""
    share = {"str-exact": END, "str": SETTLED}.get(config.method, 0.0)
    if config.method == "svd-finetune":
        return cut_epoch(config) + 1
    return -int(-share * config.epochs // 1)


def learning_rate(config: Config, steps: int, step: int) -> float:
    """The learning rate of the step after ``step`` others: the schedule at its middle, which is never quite zero."""
    begin, end = 0, config.epochs
    if config.method == "svd-finetune":
        cut = cut_epoch(config)
        begin, end = (0, cut) if step < cut * steps else (cut, end)
    progress = (step + 0.5 - begin * steps) / ((end - begin) * steps)
    if config.lr_schedule == "step":
        return config.lr * (1.0 if progress < 2 / 3 else 0.1)
    return config.lr * warmup_cosine(progress, min(1.0, config.warmup_epochs / (end - begin)))


def rank_text(budget: RankBudget) -> str:
    """The ranks as a line about a network ends with; nothing where all of its matrices are dense."""
    return f"  rank {budget.total_rank}" if budget.rows else ""


def thinned(values: Tensor) -> list[float]:
    """At most 64 of the values, evenly chosen, largest first, with four digits."""
    ordered = values.sort(descending=True).values
    places = torch.linspace(0, len(ordered) - 1, min(len(ordered), SPECTRUM)).round().long()
    return [float(f"{value:.4g}") for value in ordered.cpu()[places].tolist()]


def packed(model: nn.Module, architecture: Architecture) -> bytes:
    """The compact model's weights as safetensors, with the sizes that `rnn.models.load_trained` needs."""
    sizes = {"inputs": architecture.inputs, "outputs": architecture.outputs, "ranks": model.rnn.ranks()}
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    return safetensors.torch.save(weights, {"network": json.dumps(sizes)})  # one entry: several have no order


if __name__ == "__main__":
    sys.exit(main())
