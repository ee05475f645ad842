"""The steps of timm's own training script, on a network with 90 % zeros, with an average of its weights (EMA).

python examples/timm_finetune.py
"""

from importlib.resources import files

import numpy as np
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import nn

from str_triton import SparsityController, Target, count, densify, refresh_batch_norm, sparsify

torch.manual_seed(0)
rows = torch.from_numpy(np.loadtxt(files("str_triton.cnn") / "assets/digits.csv.gz", dtype=int, delimiter=","))
images = nn.functional.interpolate(rows[:, :64].reshape(-1, 1, 8, 8) / 16, size=32)
labels = rows[:, 64]

# With pretrained=True timm downloads weights from the hub. Everything else stays as it is.
model = timm.create_model("test_resnet", pretrained=False, num_classes=10, in_chans=1)
sparsify(model)
controller = SparsityController(model, Target(sparsity=0.9))
optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.02)
epochs, batches = 3, torch.arange(1400).split(100)
scheduler, epochs = create_scheduler_v2(
    optimizer, "cosine", num_epochs=epochs, warmup_epochs=0, updates_per_epoch=len(batches), step_on_epochs=False
)
average = ModelEmaV3(model, decay=0.9)

step = 0
for epoch in range(epochs):
    model.train()
    losses = AverageMeter()
    for batch in (torch.randperm(1400)[batch] for batch in batches):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        controller.step(step / (epochs * len(batches)))
        average.update(model, step=step)
        scheduler.step_update(step)
        losses.update(loss.item(), len(batch))
    with controller.exact(average.module), torch.no_grad():  # the average meets the budget by its own weights
        refresh_batch_norm(average.module, [images[batch] for batch in batches])
        top1, _ = accuracy(average.module.eval()(images[1400:]), labels[1400:], topk=(1, 5))
    print(f"epoch {epoch + 1}: loss {losses.avg:.2f}, average's top-1 {top1:.1f} %")

controller.finish(average.module)
budget = count(average.module, images[:1])
print(budget)
torch.save(densify(average.module).state_dict(), "timm_sparse.pt")  # timm.create_model(..., checkpoint_path=...)
