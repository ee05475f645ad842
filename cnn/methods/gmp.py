"""GMP, gradual magnitude pruning (Zhu and Gupta, 2017): more and more of the smallest weights are pruned for good."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from str_triton.cnn.methods.masks import Masked, largest


class GMP(Masked):
    """A method that prunes along a cubic schedule until `END` of training, as `SparsityController` does by default.

    Pruned weights stay zero. The target holds from `END` on.

    Args:
        weights: the Parameters, by the names of their layers.
        keep: the number of elements of each weight that survive; with ``total``, the least number.
        interval: steps between prunings.
        total: the number of elements of all weights together that survive, the largest ones of all layers ("global").
            None: each layer keeps its own number.
    """

    END = 0.7

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        keep: Sequence[int],
        *,
        interval: int,
        total: int | None = None,
    ) -> None:
        super().__init__(weights, keep)
        self.total, self.interval = total, interval
        self.pruned = -1.0  # `done` of the last pruning; the same value again would change nothing

    def step(self, progress: float) -> None:
        done = self._done(progress)
        if (self.steps % self.interval == 0 or done == 1) and done != self.pruned:
            self.prune(done)
        self.apply()
        super().step(progress)

    def scheduled(self) -> dict[str, float]:
        sizes = [weight.numel() for weight in self.weights]
        final = 1 - (sum(self.keep) if self.total is None else self.total) / sum(sizes)
        return {"sparsity": self._done(self.progress) * final}

    def _done(self, progress: float) -> float:
        """Return the share of the way from the dense network to the target that the schedule has gone."""
        return 1 - (1 - min(progress / self.END, 1)) ** 3

    @torch.no_grad()
    def prune(self, done: float) -> None:
        """Choose the survivors. ``done`` is the share of the way from the dense network to the target, 0 to 1."""
        # Pruned elements rank behind survivors whose value is 0.
        scores = [weight.abs().where(mask, -1.0) for weight, mask in zip(self.weights, self.masks, strict=True)]
        if self.total is None:
            numbers = [_between(done, s.numel(), keep) for s, keep in zip(scores, self.keep, strict=True)]
            masks = [largest(s, number) for s, number in zip(scores, numbers, strict=True)]
        else:
            masks = self._choose_globally(scores, done, self.total)
        for mask, value in zip(self.masks, masks, strict=True):
            mask.copy_(value)
        self.pruned = done

    def _choose_globally(self, scores: Sequence[Tensor], done: float, total: int) -> list[Tensor]:
        """Return masks of the largest elements of all layers, among them the `keep` largest of each layer."""
        sizes = [s.numel() for s in scores]
        held = [s.masked_fill(largest(s, keep), torch.inf) for s, keep in zip(scores, self.keep, strict=True)]
        chosen = largest(torch.cat([s.flatten() for s in held]), _between(done, sum(sizes), total))
        return [part.view(s.shape) for part, s in zip(chosen.split(sizes), scores, strict=True)]


def _between(done: float, size: int, keep: int) -> int:
    return size - round(done * (size - keep))
