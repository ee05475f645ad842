"""A training loop of your own: a small CNN with 90 % zeros, on handwritten digits.

python examples/own_loop.py
"""

from importlib.resources import files

import numpy as np
import torch
from torch import nn

from str_triton import SparsityController, Target, count, densify, parameter_groups, refresh_batch_norm, sparsify

torch.manual_seed(0)
rows = torch.from_numpy(np.loadtxt(files("str_triton.cnn") / "assets/digits.csv.gz", dtype=int, delimiter=","))
images, labels = rows[:, :64].reshape(-1, 1, 8, 8) / 16, rows[:, 64]
train, test = torch.randperm(len(images)).tensor_split([1400])

model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(256, 10)),
)
sparsify(model)
controller = SparsityController(model, Target(sparsity=0.9))
optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)

epochs, step = 6, 0
batches = list(train.split(100))
for epoch in range(epochs):
    model.train()
    for batch in batches:
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        controller.step(step / (epochs * len(batches)))
    with controller.exact():  # what is measured and saved in here costs exactly what the schedule says
        refresh_batch_norm(model, [images[batch] for batch in batches])
        with torch.no_grad():
            accuracy = float((model.eval()(images[test]).argmax(1) == labels[test]).float().mean())
        sparsity = count(model, images[:1]).sparsity
        torch.save({"model": model.state_dict(), "controller": controller.state_dict()}, "checkpoint.pt")
    print(f"epoch {epoch + 1}: {100 * accuracy:.1f} % correct, {100 * sparsity:.1f} % zeros")

budget = count(model, images[:1])
print(budget)
densify(model)  # plain layers, which hold the zeros
torch.save(model.state_dict(), "digits.pt")
