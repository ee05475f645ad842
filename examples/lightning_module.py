"""Lightning: a module with 90 % zeros.

python examples/lightning_module.py
"""

from importlib.resources import files

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from str_triton import Target, count, parameter_groups, sparsify
from str_triton.integrations.lightning import BudgetCallback


class Digits(LightningModule):
    """A network for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)),
        )
        sparsify(self)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(self, weight_decay=1e-4), lr=0.1, momentum=0.9)


seed_everything(0)
rows = torch.from_numpy(np.loadtxt(files("str_triton.cnn") / "assets/digits.csv.gz", dtype=int, delimiter=","))
data = TensorDataset(rows[:, :64] / 16, rows[:, 64])
train = DataLoader(torch.utils.data.Subset(data, range(1400)), batch_size=50, shuffle=True)
test = DataLoader(torch.utils.data.Subset(data, range(1400, len(data))), batch_size=400)

module = Digits()
trainer = Trainer(
    max_epochs=5,
    accelerator="cpu",  # leave it out to train on a GPU
    log_every_n_steps=10,
    callbacks=[BudgetCallback(Target(sparsity=0.9))],  # RankTarget(...) for low-rank layers
)
trainer.fit(module, train, test)  # ckpt_path="last" goes on from the last checkpoint
budget = count(module.network, data[:1][0])
print(budget, f"{float(trainer.callback_metrics['accuracy']):.1%} correct", sep="\n")
