"""Meets a named rank, size or cost per time step exactly: one offset common to the raw thresholds of factored matrices.

In a matrix with the raw threshold r, a component of size a (its singular value) is cut from the offset g^-1(a) - r on.
The smaller components of the matrix are cut before it, so its place in the matrix's order gives the saving of its cut.
One sort of the offsets of all matrices and a running sum of the savings give the cost of every cut, on the device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.budget.errors import DivergedError
from str_triton.budget.names import unwrapped_names
from str_triton.budget.offset_controller import OffsetController
from str_triton.budget.rank_budget import factored_matrices
from str_triton.budget.rank_offsets import balancing_shifts, filling_shifts, keep_largest, separating_moves
from str_triton.budget.rank_target import RankTarget, rank_costs
from str_triton.budget.target_kinds import require_kind
from str_triton.nn import LowRankWeight, ThresholdHolder
from str_triton.nn.shards import full, local, rows_here

# Offsets nearer than this many units of rounding count as equal: some ten roundings lie between an offset and the cut.
TIE = 8
REFACTOR = 5  # solves between one re-factoring and the next: a decomposition costs much more than a solve.


class RankController(OffsetController):
    """A controller that moves the thresholds of a model's `LowRankWeight`s to an exact budget.

        controller = RankController(model, RankTarget(compression=4))
        for i in range(steps):
            ...                             # forward, backward
            optimizer.step()
            controller.step((i + 1) / steps)

    The solve runs every `interval` steps until progress reaches `end`. Between solves the survivors drift a little:
    evaluate and write checkpoints inside `with controller.exact()` or after `solve()`. Before every fifth solve, and
    in `finish()`, the survivors are factored again (`LowRankWeight.refactor`), so that their sizes are singular values.
    At `end` the ranks are fixed: the thresholds return to their first values, m takes up the difference, cut components
    stay cut, and the optimizer continues with the others (docs/learned-rank.md has the measurements).

    One common offset gives a family of models. After a solve the model is the largest of them that does not cost more
    than the schedule says. A matrix's largest component and its equals survive in any case. At `end`, components for
    which the target still has room come back. Components whose offsets are equal up to rounding, such as those of an
    orthogonal matrix, cannot be cut one by one: `solve` and `finish` scale their m apart, each by a few rounding
    errors. If that is too little (16 bits) or not allowed (`exact`), they go together.

    Args:
        model: a model with matrices in factors, on the device where it will train. Matrices without a threshold
            (compact ones) have a fixed cost, and a matrix that several modules share counts once.
        target: the highest cost at the end. Matrices count as compact ones, or as dense ones if the factors are no
            smaller. A target in recurrent FLOPs controls the recurrent matrices; other thresholds do not move.
        schedule: "linear", "cubic" (fast first) or "constant" from progress `begin` to `end`, in the target's unit. It
            begins at the cost of all components. Before `begin` all components survive; after `end` the target holds.
        distribution: "relative": the thresholds are proportional to the norms of their matrices, measured now and at
            every factoring, so that a component is cut if its share of its matrix is small. "fixed": the thresholds
            keep their present ratios. "learned": the optimizer moves the thresholds, slowly and within bounds, in the
            first third of training.
        interval: steps between solves.

    With g = "sigmoid", whose thresholds stay below 1, components of size 1 and more are never cut.

    Raises:
        ValueError: a model without thresholded matrices (for a target in recurrent FLOPs: without recurrent ones), a
            target above the cost of all components or below the cost of one per matrix, several matrices with one raw
            threshold, "relative" with another g than "exp", or arguments out of range.
    """

    DISTRIBUTIONS = ("relative", "fixed", "learned")

    def __init__(
        self,
        model: nn.Module,
        target: RankTarget,
        *,
        schedule: str = "linear",
        begin: float = 0.0,
        end: float = 0.3,
        distribution: str = "relative",
        interval: int = 20,
    ) -> None:
        require_kind(target, RankTarget)
        super().__init__(model, schedule=schedule, begin=begin, end=end, distribution=distribution, interval=interval)
        self.target = target
        named = {n: m for n, m in factored_matrices(model).items() if m.raw_threshold is not None}
        self._matrices = [matrix for matrix in named.values() if matrix.recurrent or not target.recurrent_only]
        if not self._matrices:
            kind = "recurrent low-rank matrix" if target.recurrent_only else "low-rank matrix"
            raise ValueError(f"the model has no {kind} with a threshold for {target}")
        if len({id(matrix.raw_threshold) for matrix in self._matrices}) < len(self._matrices):
            raise ValueError(
                "one raw threshold for several matrices cannot keep a component in each: give each its own"
            )
        others = {matrix.g for matrix in self._matrices} - {"exp"}
        if distribution == "relative" and others:
            raise ValueError(f'distribution="relative" needs g="exp", not {min(others)!r}: use distribution="fixed"')
        self._names = [name for name, matrix in named.items() if any(matrix is m for m in self._matrices)]
        self._kept: list[Tensor] = []  # The values of m that exact() restores.
        self._full = sum(target.cost(matrix, matrix.max_rank) for matrix in self._matrices)
        self._keep = target.keep(rank_costs(model, target, self._matrices))
        self._others_then = self._counted(model)
        savings = [
            target.cost(matrix, rank) - target.cost(matrix, rank - 1)
            for matrix in self._matrices
            for rank in range(matrix.max_rank, 0, -1)
        ]
        self._savings = torch.tensor(savings, device=self._matrices[0].raw().device)
        modules = [m for m in model.modules() if isinstance(m, LowRankWeight) and m.raw_threshold is not None]
        for module in modules:
            module.learns_threshold = False
        held = {id(matrix.raw_threshold) for matrix in self._matrices}
        modules = [module for module in modules if id(module.raw_threshold) in held]
        self._take(model, self._matrices, modules)
        self._first = self._thresholds.whole()
        self._survivors: list[Tensor] | None = None  # The components that are left, once the ranks are fixed.
        self._balance()

    def _weights(self) -> list[Tensor]:
        return [p for matrix in self._matrices for p in (matrix.u, matrix.v, matrix.trained_spectrum())]

    def step(self, progress: float) -> None:
        """Call after `optimizer.step()`, with the share of training that is done, 0 to 1; from `end` the target is met.

        A solve does not wait for the GPU; factoring again does.
        """
        if self._survivors is None:
            super().step(progress)
            if self.progress >= self.end:
                self._settle()
            return
        if progress == 1:
            self._check_unchanged()
        self._meet()
        self._advance(progress)
        self._hold(self._survivors)
        self._control.reach()  # The ranks meet the target and are fixed: the optimizer cannot change them.

    def _follow(self) -> None:
        if self.progress >= self.end or self.steps % (self.interval * REFACTOR) == 0:
            self._factor()
        super()._follow()

    def finish(self, model: nn.Module | None = None) -> None:
        if self._survivors is None or model is not None:
            super().finish(model)
            return
        self._check_unchanged()
        self.progress = 1.0
        self._meet()
        self._hold(self._survivors)
        self._control.reach()

    @torch.no_grad()
    def solve(self) -> None:
        """Move all raw thresholds by one offset so that the model costs what the schedule says now."""
        self._meet()
        if self._survivors is not None:
            self._hold(self._survivors)
            return
        self._separate()
        super().solve()

    @contextmanager
    def exact(self, model: nn.Module | None = None) -> Iterator[None]:
        if self._survivors is not None and model is None:
            self._check_unchanged()
            yield
            return
        with super().exact(model):
            yield

    def _factor(self) -> None:
        """Make the sizes singular values, and the thresholds proportional to their norms."""
        self._require_finite()
        for matrix in self._matrices:
            matrix.refactor()
        self._balance()

    def _make_exact(self, done: float) -> None:
        if self._survivors is None and self._training is None:  # by finish(), for good
            self._factor()
            self._separate()
        self._require_finite()
        if self._survivors is None:
            super()._make_exact(done)
            return
        self._kept = [local(matrix.trained_spectrum()).clone() for matrix in self._matrices]
        self._hold(self._survivors)

    def _require_finite(self) -> None:
        for name, matrix in zip(self._names, self._matrices, strict=True):
            if not bool(torch.isfinite(matrix.singular_values()).all()):
                reason = "holds NaN or infinity, or values too large for its singular values: training has diverged"
                raise DivergedError(f"matrix {name!r} {reason}; go back to an earlier checkpoint")

    @torch.no_grad()
    def _undo_exact(self) -> None:
        for matrix, m in zip(self._matrices, self._kept, strict=False):  # empty if the ranks are not fixed
            local(matrix.trained_spectrum()).copy_(m)
        self._kept = []

    def _bind(self, model: nn.Module) -> Sequence[ThresholdHolder]:
        found = unwrapped_names(factored_matrices(model))
        for name, matrix in zip(self._names, self._matrices, strict=True):
            other = found.get(name)
            if other is None or other.shape != matrix.shape or other.max_rank != matrix.max_rank:
                raise ValueError(
                    f"the model has no factored matrix {name!r} of shape {list(matrix.shape)} and {matrix.max_rank} "
                    "components: give a copy or an average of the controller's own model"
                )
        self._matrices = [found[name] for name in self._names]
        return self._matrices

    def _settle(self) -> None:
        """Fix the ranks for the rest of training: the present ones, and components for which the target has room."""
        self.solve()
        offsets = [matrix.pruning_offsets().sort(descending=True).values.tolist() for matrix in self._matrices]
        costs = [[self.target.cost(matrix, rank) for rank in range(matrix.max_rank + 1)] for matrix in self._matrices]
        shifts = filling_shifts(offsets, costs, self._keep, tie=float(self._critical_offsets()[1]))
        self._thresholds.move([raw.new_tensor(shift) for raw, shift in zip(self._raws, shifts, strict=True)])
        for matrix, raw in zip(self._matrices, self._first, strict=True):
            matrix.settle(raw)
        self._survivors = [full(matrix.trained_spectrum()) != 0 for matrix in self._matrices]
        self._control.reach()
        self._let_learn(False)

    @torch.no_grad()
    def _hold(self, survivors: list[Tensor]) -> None:
        """Set m of the cut components to 0 again, after an optimizer's momentum has changed it."""
        for matrix, mask in zip(self._matrices, survivors, strict=True):
            m = matrix.trained_spectrum()
            local(m).mul_(mask[rows_here(m)])

    def _counted(self, model: nn.Module) -> int:
        return self.target.fixed(rank_costs(model, self.target, self._matrices))

    def _is_within(self) -> bool:
        model = self._thresholds.model  # where compact layers may have replaced some of the matrices
        modules = {id(module) for module in model.modules()}
        left = [matrix for matrix in self._matrices if id(matrix) in modules]
        others = self.target.fixed(rank_costs(model, self.target, left))
        cost = others + sum(self.target.cost(matrix, matrix.rank) for matrix in left)
        return cost <= self._others_then + self._keep

    def measure(self) -> dict[str, float]:
        return {"total_rank": sum(matrix.rank for matrix in self._matrices)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"survivors": self._survivors, "first": [raw.clone() for raw in self._first]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        survivors = state["survivors"]
        if survivors is not None:
            survivors = [mask.to(matrix.u.device) for mask, matrix in zip(survivors, self._matrices, strict=True)]
        self._let_learn(survivors is None and self.distribution == "learned")
        self._survivors = survivors
        self._first = [first.to(raw) for first, raw in zip(state["first"], self._thresholds.own, strict=True)]

    @torch.no_grad()
    def _temper(self) -> None:
        # The bounds hold for thresholds that are not held back: otherwise they would empty a matrix whose threshold is.
        own, before = self._thresholds.own, self._thresholds.before
        moved = list(zip((*own, *before), self._held_back * 2, strict=True))
        for raw, held in moved:
            raw.add_(held)
        super()._temper()
        for raw, held in moved:
            raw.sub_(held)

    def _cut(self, done: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        critical, tie = self._critical_offsets()
        values, caps = zip(*(keep_largest(offsets.sort().values, tie) for offsets in critical), strict=True)
        ordered, order = torch.cat(values).sort(stable=True)
        infinity = ordered.new_full((1,), torch.inf)
        # At place n the first n are cut: their offsets go up to below[n]. The others, from above[n] on, are kept.
        below, above = torch.cat([-infinity, ordered]), torch.cat([ordered, infinity])
        saved = torch.cat([self._savings.new_zeros(1), self._savings[order].cumsum(0)])
        enough = self._full - saved <= self._budget(done)
        places = torch.arange(len(below), device=below.device)
        place = torch.where(enough & (above - below > tie), places, places[-1:]).amin()
        place = place.minimum((ordered < torch.inf).sum()).reshape(1)  # at most all that can be cut
        return below.gather(0, place).squeeze(0), above.gather(0, place).squeeze(0), list(caps)

    def _critical_offsets(self) -> tuple[list[Tensor], Tensor]:
        """Return the offset from which each component is cut, per matrix; and the distance of equal offsets."""
        critical = [
            matrix.pruning_offsets() - held_back
            for matrix, held_back in zip(self._matrices, self._held_back, strict=True)
        ]
        finite = torch.cat([*critical, *self._thresholds.whole()]).nan_to_num(0.0, 0.0, 0.0)
        rounding = max(torch.finfo(raw.dtype).eps for raw in self._raws)
        return critical, TIE * rounding * finite.abs().amax().clamp(min=1)

    def _balance(self) -> None:
        """Make the thresholds proportional to the norms of their matrices, if the distribution is "relative"."""
        if self.distribution == "relative":
            raws = [raw + held for raw, held in zip(self._thresholds.whole(), self._held_back, strict=True)]
            sizes = [matrix.singular_values() * matrix.spectrum().any() for matrix in self._matrices]
            self._thresholds.move(balancing_shifts(raws, sizes))

    def _separate(self) -> None:
        """Scale m of the components whose offsets are equal up to rounding, so that a threshold separates them."""
        for matrix, move in zip(self._matrices, separating_moves(*self._critical_offsets()), strict=True):
            m = matrix.trained_spectrum()
            local(m).mul_(move.exp()[rows_here(m)])

    def _budget(self, done: float) -> Tensor:
        """Return the budget of the controlled matrices at this point of the schedule, as int64 on their device."""
        keep = self._full - round(done * (self._full - self._keep))
        return torch.full((), keep, device=self._savings.device)
