"""A comparison of ways to learn a rank: variants of LowRankWeight and RankController, on Japanese Vowels.

    python -m benchmarks.studies.learned_rank_screen [--variants NAME ...] [--total-rank N ...]

Each variant trains a bidirectional GRU of 64 units to the same total rank, on four fifths of the 270 training
utterances, and is measured on the other fifth. The seed determines the fold and all random numbers. The test data are
not used. A line per run is appended to benchmarks/results/learned_rank_screen.jsonl; runs that it already holds are
skipped.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.runs import RunFile
from benchmarks.timing import RESULTS
from str_triton import LowRankWeight, RankController, RankTarget, soft_threshold
from str_triton.rnn.data import load

RUNS = RunFile(RESULTS / "learned_rank_screen.jsonl", ("variant", "total_rank", "seed"))
HIDDEN, EPOCHS, BATCH, LR, NOISE, FOLDS = 64, 40, 30, 5e-3, 0.6, 5
PENALTY = 0.01  # of the orthogonality penalty


class Unscaled(LowRankWeight):
    """The paper's variant: the threshold acts on m_k, whatever the norms of the factors are."""

    def spectrum(self) -> Tensor:
        return soft_threshold(self.m, self.raw_threshold, g=self.g, gradient=self.gradient)

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        return self.m.abs()


class Unbalanced(LowRankWeight):
    """A variant whose new factors are unit vectors, with the whole norm in m."""

    @torch.no_grad()
    def refactor(self) -> None:
        super().refactor()
        for factor in (self.u, self.v):
            norms = factor.norm(dim=0)
            factor.div_(norms)
            self.m.mul_(norms)


class Unsettled(RankController):
    """A variant whose thresholds move until the end of training, with or without new factors."""

    refactors = True

    def step(self, progress: float) -> None:
        if self.refactors and self.steps % 20 == 0:
            for matrix in self._matrices:
                matrix.refactor()
        super(RankController, self).step(progress)

    def _factor(self) -> None:
        """Do nothing where the library's controller computes new factors."""


class Drifting(Unsettled):
    """A variant that neither settles its thresholds nor computes new factors."""

    refactors = False


class EachSolve(RankController):
    """A variant that settles its thresholds, and computes new factors before every solve."""

    def step(self, progress: float) -> None:
        if self._survivors is None and self.steps % self.interval == 0:
            for matrix in self._matrices:
                matrix.refactor()
        super().step(progress)


class Unfactored(RankController):
    """A variant that settles its thresholds, but never computes new factors."""

    def step(self, progress: float) -> None:
        refactor, LowRankWeight.refactor = LowRankWeight.refactor, lambda self: None
        try:
            super().step(progress)
        finally:
            LowRankWeight.refactor = refactor


OPTIONS = ("schedule", "begin", "end", "distribution")  # of the controller
UNSETTLED = {"schedule": "cubic", "end": 0.7, "distribution": "fixed"}
# name: class of the matrices, their gradient, class of the controller, its options, other
VARIANTS = {
    "default": {},
    "default, the size in m": {"matrix": Unbalanced},
    "no fix": {"matrix": Unscaled, "controller": Drifting, **UNSETTLED},
    "norm-scaled": {"controller": Drifting, **UNSETTLED},
    "norm-scaled, straight-through": {"controller": Drifting, "gradient": "straight_through", **UNSETTLED},
    "orthogonality penalty": {"controller": Drifting, "penalty": PENALTY, **UNSETTLED},
    "factored anew": {"controller": Unsettled, **UNSETTLED},
    "factored anew, straight-through": {"controller": Unsettled, "gradient": "straight_through", **UNSETTLED},
    "settled, never factored anew": {"controller": Unfactored},
    "settled, factored anew at each solve": {"controller": EachSolve},
    "default, straight-through": {"gradient": "straight_through"},
    "default, fixed ratios": {"distribution": "fixed"},
    "default, fixed ratios, cubic until 0.5": {"distribution": "fixed", "schedule": "cubic", "end": 0.5},
    "default, cubic until 0.5": {"schedule": "cubic", "end": 0.5},
    "default, from 0.15": {"begin": 0.15},
    "default, at once at 0.3": {"begin": 0.3, "schedule": "constant"},
    "default, until 0.5": {"end": 0.5},
    "default, until 0.7": {"end": 0.7},
    "default, learned distribution": {"distribution": "learned"},
    "default, factors per gate": {"gates": 3},
    "fixed rank": {"fixed": True},
    "dense": {"dense": True},
}


class Network(nn.Module):
    """A bidirectional GRU whose matrices are multiplied out, so that it takes any kind of factors."""

    def __init__(self, inputs: int, classes: int, total_rank: int, variant: dict) -> None:
        super().__init__()
        gru = nn.GRU(inputs, HIDDEN, bidirectional=True)
        self.names = [name for name, _ in gru.named_parameters()]
        self.vectors = nn.ParameterDict({n: p for n, p in gru.named_parameters() if p.dim() == 1 or "dense" in variant})
        kind = variant.get("matrix", LowRankWeight)
        rank = total_rank // 4 if "fixed" in variant else None
        self.matrices = nn.ModuleDict()
        for name, parameter in gru.named_parameters():
            if name not in self.vectors:
                for part, weight in enumerate(parameter.detach().chunk(variant.get("gates", 1))):
                    matrix = kind.from_dense(weight, rank, gradient=variant.get("gradient", "masked"))
                    self.matrices[f"{name}/{part}"] = matrix
        self.classifier = nn.Linear(2 * HIDDEN, classes)

    def weight(self, name: str) -> Tensor:
        if name in self.vectors:
            return self.vectors[name]
        return torch.cat([matrix.weight() for part, matrix in self.matrices.items() if part.split("/")[0] == name])

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        weights = [self.weight(name) for name in self.names]
        zeros = x.new_zeros(2, len(x), HIDDEN)
        state = torch._VF.gru(packed.data, packed.batch_sizes, zeros, weights, True, 1, 0.0, self.training, True)[1]
        return self.classifier(state[:, packed.unsorted_indices].transpose(0, 1).flatten(1))

    def penalty(self) -> Tensor:
        """Return the squared distance of all factors from orthonormal columns."""
        factors = [F.normalize(f, dim=0) for matrix in self.matrices.values() for f in (matrix.u, matrix.v)]
        return sum(((f.mT @ f - torch.eye(f.shape[1])) ** 2).sum() for f in factors)


def run(name: str, total_rank: int, seed: int) -> dict:
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    data = load("japanese-vowels")
    x, lengths, labels = (
        torch.cat([a, b]) for a, b in zip(everything(data.train), everything(data.validation), strict=True)
    )
    held_out = (
        torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed // FOLDS)) % FOLDS == seed % FOLDS
    )
    train, test = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    network = Network(x.shape[2], data.num_classes, total_rank, variant)
    controller = None
    if not variant.keys() & {"fixed", "dense"}:
        target = total_rank * variant.get("gates", 1) * 2 // 3 if "gates" in variant else total_rank
        options = {key: variant[key] for key in OPTIONS if key in variant}
        controller = variant.get("controller", RankController)(network, RankTarget(total_rank=target), **options)
    elif "fixed" in variant:
        for matrix in network.matrices.values():
            matrix.raw_threshold.requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    steps, step, begin = EPOCHS * math.ceil(len(train) / BATCH), 0, time.perf_counter()
    for _ in range(EPOCHS):
        for chosen in train[torch.randperm(len(train))].split(BATCH):
            progress = step / steps
            optimizer.param_groups[0]["lr"] = LR * min(1, progress / 0.1) * (1 + math.cos(math.pi * progress)) / 2
            scores = network(x[chosen] + NOISE * torch.randn_like(x[chosen]), lengths[chosen])
            loss = F.cross_entropy(scores, labels[chosen]) + variant.get("penalty", 0) * network.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if controller is not None:
                controller.step(step / steps)
    with torch.no_grad():
        network.eval()
        scores = network(x[test], lengths[test])
    factored = sum(matrix.compact_cost(matrix.rank) for matrix in network.matrices.values())
    return {
        "variant": name, "total_rank": total_rank, "seed": seed,
        "accuracy": (scores.argmax(1) == labels[test]).double().mean().item(),
        "loss": F.cross_entropy(scores, labels[test]).item(),
        "ranks": [matrix.rank for matrix in network.matrices.values()],
        "params": factored + sum(p.numel() for p in (*network.vectors.values(), *network.classifier.parameters())),
        "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def everything(examples) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator()
    x, lengths, labels = examples.batch(torch.arange(len(examples)), augment=False, generator=generator, device="cpu")
    return F.pad(x, (0, 0, 0, 29 - x.shape[1])), lengths, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--total-rank", nargs="+", type=int, default=[12, 24])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RUNS.path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    held = RunFile(args.out, RUNS.key)
    for total_rank in args.total_rank:
        for name in args.variants:
            wanted = [{"variant": name, "total_rank": total_rank, "seed": seed} for seed in range(args.seeds)]
            for job in held.missing(wanted):
                held.append(run(job["variant"], total_rank, job["seed"]))
            runs = [r for r in held.read() if (r["variant"], r["total_rank"]) == (name, total_rank)]
            print(
                f"{total_rank:3} {name:40} accuracy {100 * mean(r['accuracy'] for r in runs):6.2f}  "
                f"loss {mean(r['loss'] for r in runs):.3f}  parameters {mean(r['params'] for r in runs):.0f}  "
                f"{mean(r['seconds'] for r in runs):.1f} s  ranks {runs[0]['ranks']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
