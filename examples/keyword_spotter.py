"""A keyword spotter from nothing to C: sounds, features, a GRU that learns its rank, C99 for a microcontroller.

python examples/keyword_spotter.py
"""

import torch
from torch import Tensor, nn

from str_triton import LowRankGRU, RankController, RankTarget, count_ranks, deploy, parameter_groups

RATE, WORDS = 8000, ("rising", "falling", "high", "low", "noise")
torch.manual_seed(0)


def sounds(number: int) -> tuple[Tensor, Tensor]:
    """Return made-up words [number, samples] in noise, and which ones they are. Put your recordings here."""
    which, time = torch.randint(len(WORDS), (number,)), torch.linspace(0, 1, RATE // 2)
    begin = torch.tensor([500.0, 2000, 2000, 500, 0])[which, None] * (0.8 + 0.4 * torch.rand(number, 1))
    end = torch.tensor([2000.0, 500, 2000, 500, 0])[which, None] * (0.8 + 0.4 * torch.rand(number, 1))
    tone = torch.sin(torch.pi * (begin * time + (end - begin) * time**2 / 2)) * torch.hann_window(len(time))
    return tone * (which < 4)[:, None] + 0.3 * torch.randn(number, len(time)), which


def features(waves: Tensor) -> Tensor:
    """Return the logarithm of the energy in 16 bands, [number, frames, 16]."""
    spectrum = torch.stft(waves, 256, 128, window=torch.hann_window(256), center=False, return_complex=True)
    return (spectrum[:, :128].abs().square().unflatten(1, (16, 8)).mean(2) + 1e-6).log().mT


class Spotter(nn.Module):
    """A GRU and a linear layer that scores its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = LowRankGRU(16, 64, batch_first=True), nn.Linear(64, len(WORDS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[1][-1])


(waves, labels), (test, expected) = sounds(800), sounds(200)
mean, std = features(waves).mean((0, 1)), features(waves).std((0, 1))
x, model, steps = (features(waves) - mean) / std, Spotter(), 150
controller = RankController(model, RankTarget(compression=4))
optimizer = torch.optim.Adam(parameter_groups(model, weight_decay=0.0), lr=5e-3)
for step in range(1, steps + 1):
    batch = torch.randint(len(x), (50,))
    nn.functional.cross_entropy(model(x[batch]), labels[batch]).backward()
    optimizer.step()
    optimizer.zero_grad()
    controller.step(step / steps)

with torch.no_grad():
    correct = float((model((features(test) - mean) / std).argmax(1) == expected).float().mean())
print(f"{100 * correct:.1f} % correct\n{count_ranks(model)}")
# Writes spotter.h and spotter.c.
print(deploy.export_c(model, "build/spotter", weights="int8", outputs=WORDS, mean=mean, std=std))
