"""A loop with accelerate: several processes, gradient accumulation, mixed precision, checkpoints.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from str_triton import SparsityController, Target, count, densify, parameter_groups, refresh_batch_norm, sparsify

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
rows = torch.from_numpy(np.loadtxt(files("str_triton.cnn") / "assets/digits.csv.gz", dtype=int, delimiter=","))
rows = rows.to(accelerator.device)
images, labels = rows[:, :64].reshape(-1, 1, 8, 8) / 16, rows[:, 64]
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=25, shuffle=True)

model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    *(nn.Linear(288, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)),
)
sparsify(model)
controller = SparsityController(model, Target(sparsity=0.9))
optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=0.05, momentum=0.9)
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.register_for_checkpointing(controller)  # save_state and load_state take it along

epochs = 4
folder = Path("accelerate_checkpoint")
if folder.exists():
    accelerator.load_state(folder)
first = round(controller.progress * epochs)
for epoch in range(first, epochs):
    prepared.train()
    for number, (x, y) in enumerate(loader, start=1):
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:  # the optimizer has made a step
            controller.step((epoch + number / len(loader)) / epochs)
    with controller.exact(), torch.no_grad():
        refresh_batch_norm(model, images[:1400].split(100))
        correct = model.eval()(images[1400:]).argmax(1) == labels[1400:]
        accelerator.save_state(folder)
    accelerator.print(f"epoch {epoch + 1}: {correct.float().mean():.1%} correct, {controller.measure()}")

budget = count(model, images[:1])
accelerator.print(budget)
accelerator.save(densify(model).state_dict(), "digits.pt")  # plain layers, which hold the zeros
accelerator.end_training()
