"""The callback for Lightning, by the real Trainer."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from str_triton import LowRankLinear, RankTarget, Target, count_ranks, parameter_groups, plain_state_dict, sparsify
from tests.processes import rank, run_job

lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra lightning")
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from str_triton.integrations.lightning import BudgetCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

EPOCHS, STEPS = 4, 8  # of two batches each
WEIGHTS = 10 * 12 + 12 * 12
ZEROS = round(0.8 * WEIGHTS)
LINEAR = {"schedule": "linear", "end": 1.0, "interval": 3}


class Module(lightning.LightningModule):
    """A network whose embedding is the weight of its last layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: dict[int, set[int]] = {}
        self.make()

    def make(self) -> None:
        torch.manual_seed(1)
        self.embedding, self.body, self.out = nn.Embedding(10, 12), nn.Linear(12, 12), nn.Linear(12, 10, bias=False)
        self.out.weight = self.embedding.weight
        sparsify(self)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self.out(self.body(self.embedding(x)).relu()), labels)

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        self.log("loss", self.training_step(batch, number))
        self.validated.setdefault(self.trainer.global_step, set()).add(zeros(self.state_dict()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(self, weight_decay=0.1), lr=0.1, momentum=0.9)


class Late(Module):
    """A module whose layers have thresholds only when Lightning asks for them."""

    def make(self) -> None:
        pass

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            super().make()


class LowRank(Module):
    """A module with a matrix in factors."""

    def make(self) -> None:
        self.embedding, self.body, self.out = nn.Embedding(10, 12), LowRankLinear(12, 12), nn.Linear(12, 10)


def zeros(state: dict[str, Tensor]) -> int:
    """Return the zeros of the weights in a sparsified module's state dict, the shared one once."""
    plain = plain_state_dict(state)
    return sum(int((plain[name] == 0).sum()) for name in ("embedding.weight", "body.weight"))


def data(batch: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    columns = (torch.randint(10, (16,), generator=generator) for _ in range(2))
    return DataLoader(TensorDataset(*columns), batch)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    arguments = {
        "max_epochs": EPOCHS, "accumulate_grad_batches": 2, "accelerator": "cpu", "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
    }  # fmt: skip
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **arguments | options)


def test_what_is_validated_and_saved_costs_what_the_schedule_says(tmp_path: Path) -> None:
    module = Module()
    whole = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    weights = ModelCheckpoint(tmp_path, "weights-{step}", monitor="loss", save_top_k=-1, save_weights_only=True)
    log = CSVLogger(tmp_path)
    run = trainer(tmp_path, whole, weights, BudgetCallback(Target(sparsity=0.8), **LINEAR), logger=log)
    run.fit(module, data(), data())
    due = {step: round(step / STEPS * ZEROS) for step in range(0, STEPS + 1, 2)}
    assert module.validated == {step: {number} for step, number in due.items()}
    for step in range(2, STEPS + 1, 2):
        for prefix in ("", "weights-"):
            saved = torch.load(tmp_path / f"{prefix}step={step}.ckpt")
            assert zeros(saved["state_dict"]) == due[step]
            assert ("optimizer_states" in saved) == (prefix == "")
    with open(Path(log.log_dir, "metrics.csv")) as file:
        logged = [float(row["sparsity"]) for row in csv.DictReader(file) if row["sparsity"]]
    assert logged == sorted(logged)
    assert (len(logged), logged[-1]) == (STEPS, pytest.approx(ZEROS / WEIGHTS))
    run.save_checkpoint(tmp_path / "final.ckpt")
    assert zeros(torch.load(tmp_path / "final.ckpt")["state_dict"]) == zeros(module.state_dict()) == ZEROS
    again = Module()
    trainer(tmp_path, BudgetCallback(Target(sparsity=0.8))).validate(
        again, data(), tmp_path / "step=4.ckpt", verbose=False
    )
    assert again.validated == {0: {due[4]}}


@pytest.mark.parametrize("module", [Module, Late])
def test_a_resumed_training_with_tied_embeddings_gives_the_same_bits(tmp_path: Path, module: type[Module]) -> None:
    def run(resume: Path | None) -> dict[Any, Tensor]:
        network = module()
        callback = BudgetCallback(Target(sparsity=0.8), distribution="learned", **LINEAR)
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer(tmp_path, callback, saved).fit(network, data(), data(), ckpt_path=resume)
        assert network.out.weight is network.embedding.weight
        return network.state_dict() | dict(enumerate(callback.controller.state_dict()["raw_thresholds"]))

    whole, resumed = run(None), run(tmp_path / "step=4.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert zeros(resumed) == ZEROS


def test_a_training_that_stops_early_is_finished(tmp_path: Path) -> None:
    module = Module()
    stop = EarlyStopping("loss", patience=1, mode="max")
    run = trainer(tmp_path, BudgetCallback(Target(sparsity=0.8)), stop)
    run.fit(module, data(), data())
    assert run.global_step < STEPS
    assert zeros(module.state_dict()) == ZEROS


def test_ranks_are_met(tmp_path: Path) -> None:
    module = LowRank()
    trainer(tmp_path, BudgetCallback(RankTarget(total_rank=5))).fit(module, data())
    assert count_ranks(module).total_rank == 5


def test_a_training_without_an_end_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, BudgetCallback(Target(sparsity=0.8)), max_epochs=-1)
    with pytest.raises(ValueError, match="max_steps"):
        run.fit(Module(), data())


def train_on_two(folder: Path) -> int:
    module = Module()
    callback = BudgetCallback(Target(sparsity=0.8), interval=3)
    run = trainer(folder, callback, strategy="ddp", devices=2, max_epochs=2)
    run.fit(module, data(2), data(2))
    torch.save(module.state_dict(), folder / f"{rank()}.pt")
    return 0


def test_two_processes_train_the_same_module(tmp_path: Path) -> None:
    job = run_job(tmp_path, train_on_two, tmp_path)
    assert job.codes == [0, 0], job.err
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert zeros(first) == ZEROS
