"""The raw thresholds that a controller moves, whole or spread over processes by `fully_shard`."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from str_triton.budget.processes import Processes
from str_triton.nn import ThresholdedWeight, ThresholdHolder
from str_triton.nn.shards import full, is_sharded, local, reshard, rows_here, shard_dimension

# Limits of the optimizer's changes of learned thresholds: without them a layer dies (docs/exact-budgets.md).
LEARNING_RATE = 0.1  # share of the optimizer's step
BOUND = 0.5  # largest distance of a raw threshold from the mean


class RawThresholds:
    """The raw thresholds of some modules, each once, and their values when the controller last changed them.

    `fully_shard` may replace the Parameters in the modules at any time, so they are looked up at each use.

    Attributes:
        before: the values before the optimizer's step; each process holds its own elements, like `own`.
        processes: the processes over which the model's parameters are spread.
    """

    def __init__(self, model: nn.Module, holders: Iterable[ThresholdHolder], others: Iterable[Tensor] = ()) -> None:
        first: dict[int, ThresholdHolder] = {}
        self.model, self._users = model, list(holders)
        for holder in self._users:
            first.setdefault(id(holder.raw_threshold), holder)
        self._holders = list(first.values())
        self.before: list[Tensor] = []
        self.meet(others)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The Parameters as they are now."""
        return [holder.raw() for holder in self._holders]

    @property
    def own(self) -> list[Tensor]:
        """This process's elements, detached, in the Parameters' memory."""
        return [local(raw) for raw in self.parameters]

    def meet(self, others: Iterable[Tensor] = ()) -> None:
        """Read how the parameters are sharded now; `others` are further parameters that a controller reads.

        Raises:
            ValueError: parameters that are sharded in a way that controllers do not support.
        """
        reshard(self.model)
        own = self.own
        if [(raw.shape, raw.device) for raw in own] != [(raw.shape, raw.device) for raw in self.before]:
            self.before = [raw.clone() for raw in own]
        self.processes = Processes.of([*self.parameters, *others])

    @property
    def lost(self) -> ThresholdHolder | None:
        """One of the modules that is no longer in the model; None if all are."""
        present = {id(module) for module in self.model.modules()}
        return next((holder for holder in self._users if id(holder) not in present), None)

    def require_present(self) -> None:
        """Raise ValueError if one of the modules is no longer in the model: what replaced it would not be counted."""
        if lost := self.lost:
            raise ValueError(
                f"a {type(lost).__name__} that the controller was made for is no longer in the model: make a new "
                "controller after replacing layers"
            )

    def mean(self) -> Tensor:
        """Return the mean of all elements, in their dtype; the same bits in every process."""
        sums = self.processes.sum_once([raw.sum(dtype=torch.float64) for raw in self.own], self.parameters)
        return (sums.sum() / sum(raw.numel() for raw in self.parameters)).to(self.own[0])

    @torch.no_grad()
    def move(self, shifts: list[Tensor]) -> None:
        """Add a shift to each raw threshold."""
        for raw, before, shift in zip(self.own, self.before, shifts, strict=True):
            raw.add_(shift)
            before.add_(shift)

    @torch.no_grad()
    def hold(self) -> None:
        """Undo the optimizer's step: weight decay also moves thresholds that are not trained."""
        torch._foreach_copy_(self.own, self.before)

    @torch.no_grad()
    def temper(self, frozen: bool) -> None:
        """Limit the optimizer's step to a share of it, or undo it if `frozen`, and the distance from the mean."""
        rate, mean = 0.0 if frozen else LEARNING_RATE, self.mean()
        for raw, before in zip(self.own, self.before, strict=True):
            raw.copy_(torch.lerp(before, raw, rate).clamp(mean - BOUND, mean + BOUND))
            before.copy_(raw)

    def save(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return copies of this process's elements, now and before the optimizer's step."""
        return [raw.clone() for raw in self.own], [raw.clone() for raw in self.before]

    @torch.no_grad()
    def restore(self, saved: tuple[list[Tensor], list[Tensor]]) -> None:
        """Restore the values that `save` returned."""
        for now, then in zip((self.own, self.before), saved, strict=True):
            for raw, value in zip(now, then, strict=True):
                raw.copy_(value)

    def whole(self, own: list[Tensor] | None = None) -> list[Tensor]:
        """Return copies of all elements of each raw threshold; `own`: values to use for this process's elements."""
        own = self.own if own is None else own
        return [gathered(raw, parameter) for raw, parameter in zip(own, self.parameters, strict=True)]

    @torch.no_grad()
    def load(self, values: Iterable[Tensor]) -> None:
        """Set all elements of each raw threshold from `values`."""
        for raw, before, parameter, value in zip(self.own, self.before, self.parameters, values, strict=True):
            raw.copy_(value[rows_here(parameter)])
            before.copy_(raw)


def raws_for_rows(weights: Sequence[ThresholdedWeight], processes: Processes) -> list[Tensor]:
    """Return for each weight the raw threshold, or the part of it that belongs to this process's rows, detached.

    One message brings all raw thresholds of one element to all processes.
    """
    single = {id(w.raw): w.raw for w in weights if w.raw.numel() == 1 and shard_dimension(w.raw) is not None}
    if single:
        # A process without the element adds 0.
        sums = processes.sum(torch.stack([local(raw).sum(dtype=torch.float64) for raw in single.values()]))
        values = [value.to(raw.device, raw.dtype) for raw, value in zip(single.values(), sums.split(1), strict=True)]
        single = dict(zip(single, values, strict=True))
    return [single[id(w.raw)] if id(w.raw) in single else w.local_raw for w in weights]  # noqa: SIM401 (it gathers)


@torch.no_grad()
def gathered(own: Tensor, like: Tensor) -> Tensor:
    """Return all elements of a tensor that is spread as `like` is, of which this process has `own`; a copy."""
    if not is_sharded(like):
        return own.detach().clone()
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(
        own.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return full(spread).clone()
