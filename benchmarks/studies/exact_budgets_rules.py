"""Rules of the screen that distribute a budget over layers by setting their thresholds relative to each other."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INTERVAL = 10  # steps between solves, and between what the slower rules do
Tensors = list[Tensor]


class Rule:
    """A rule for the tilt [layers], the relative log thresholds of the layers. This one keeps them equal (global)."""

    def begin(self, costs: Tensor) -> Tensor:
        """Return the first tilt. costs [layers]: a layer's FLOPs per weight, divided by the mean over all weights."""
        self.costs = costs
        return torch.zeros_like(costs)

    def update(self, tilt: Tensor, weights: Tensors, raws: Tensors, progress: float, lr: float) -> Tensor:
        """Return the next tilt, from this step's gradients of the weights and of the log thresholds `raws`."""
        return tilt


@dataclass
class Static(Rule):
    """A constant tilt = exponent * log(FLOPs per weight)."""

    exponent: float

    def begin(self, costs: Tensor) -> Tensor:
        return self.exponent * costs.log()


@dataclass
class Sgd(Rule):
    """A tilt trained by SGD with momentum, at `rate` times the learning rate, within `bound`, until `freeze`."""

    rate: float
    bound: float = math.inf
    freeze: float = 1.0
    velocity = 0.0

    def update(self, tilt: Tensor, weights: Tensors, raws: Tensors, progress: float, lr: float) -> Tensor:
        if progress > self.freeze:
            return tilt
        self.velocity = 0.9 * self.velocity + torch.cat([raw.grad for raw in raws])
        tilt = tilt - self.rate * lr * self.velocity
        return (tilt - tilt.mean()).clamp(-self.bound, self.bound)


@dataclass
class Surface(Rule):
    """Steps on the surface of equal sparsity, towards equal marginal loss per weight * (FLOPs per weight) ** cost."""

    cost: float
    bound: float = math.inf
    gradient, steps = 0.0, 0

    def update(self, tilt: Tensor, weights: Tensors, raws: Tensors, progress: float, lr: float) -> Tensor:
        self.gradient = self.gradient + torch.cat([raw.grad for raw in raws])
        self.steps += 1
        if self.steps % INTERVAL:
            return tilt
        gradient, self.gradient = self.gradient / INTERVAL, 0.0
        if progress < 0.02:
            return tilt
        thresholds = [float(raw.exp()) for raw in raws]
        around = [near(w, a * math.exp(-0.25), a * math.exp(0.25)) for w, a in zip(weights, thresholds, strict=True)]
        crossing = torch.stack([where.sum() for where in around])
        marginal = gradient / ((crossing / 0.5 + 1) * self.costs**self.cost)  # crossing: per unit of log threshold
        direction = (marginal.mean() - marginal) / (marginal - marginal.mean()).abs().mean().clamp(min=1e-12)
        tilt = tilt + 0.02 * direction.clamp(-1, 1)
        return (tilt - tilt.mean()).clamp(-self.bound, self.bound)


@dataclass
class Fisher(Rule):
    """Second order: tilt = log(F ** (-beta / 2) * costs ** cost), F a moving mean of the squared gradient.

    With beta = 1 and cost = 0 all weights at their thresholds have the same saliency F w^2. `local`: F is the mean over
    the weights near the threshold only.
    """

    beta: float
    cost: float = 0.0
    local: bool = False
    steps, average = 0, None

    def update(self, tilt: Tensor, weights: Tensors, raws: Tensors, progress: float, lr: float) -> Tensor:
        self.steps += 1
        if self.steps % INTERVAL:
            return tilt
        gradients = [
            w.grad[near(w, 0.7 * raw.exp(), 1.5 * raw.exp())] if self.local else w.grad
            for w, raw in zip(weights, raws, strict=True)
        ]
        squares = torch.stack([g.square().mean().nan_to_num(1e-12) for g in gradients]).clamp(min=1e-20)
        self.average = squares if self.average is None else 0.9 * self.average + 0.1 * squares
        tilt = -0.5 * self.beta * self.average.log() + self.cost * self.costs.log()
        return tilt - tilt.mean()


def near(weight: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return a mask of the weights between two thresholds."""
    return (weight.abs() > low) & (weight.abs() < high)
