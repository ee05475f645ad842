"""The screen before the study of exact budgets: 30 rules to distribute a budget over layers, one seed, 20,000 images.

    python -m benchmarks.studies.exact_budgets_screen --data-dir DIR [--variants ...] [--targets ...]
    python -m benchmarks.studies.exact_budgets_screen --table

Appends a line per run to benchmarks/results/exact_budgets_screen.jsonl and skips runs that it already holds. A layer's
soft threshold is exp(tilt + offset). One offset for all layers meets the schedule's sparsity exactly. A rule of
exact_budgets_rules.py sets the tilt. The network is that of exact_budgets.py. Whole batches are mirrored, and weight
decay applies to all parameters.

Rules that collapsed at 99 %, and the reasons as far as they are known (see docs/exact-budgets.md):
- magnitude-no-floor: all weights of a layer were pruned. All other rules keep some weights in each layer, the floor.
- learned-free-*, learned-slow-ste: SGD raised the first layer's threshold until 1, 0 and 9 of its weights were left
  (0: its tilt had grown to 2,489, where float32 no longer resolves the floor's margin).
- surface-flop, surface-half: the threshold of the last layer, the only one without batch norm, kept falling. The other
  layers kept about as many weights as with static-0.35, so this alone does not explain the collapse.
- fisher-1: five of seven layers fell to their floors; fisher-1-flop: two. fisher-0.5-flop and global-ste-rescaled: not
  known; all their layers kept more.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from benchmarks.runs import RunFile
from benchmarks.studies.exact_budgets import BATCH, END, IMAGE, LR, WEIGHT_DECAY, network
from benchmarks.studies.exact_budgets_rules import INTERVAL, Fisher, Rule, Sgd, Static, Surface
from benchmarks.tables.cnn import screen_table
from benchmarks.timing import RESULTS, machine
from str_triton import count, soft_threshold
from str_triton.cnn.data import Data, Images, load

RUNS = RunFile(RESULTS / "exact_budgets_screen.jsonl", ("variant", "target"))


class Magnitude:
    """Global magnitude pruning on the schedule. At target 0 nothing is pruned: the dense network."""

    def __init__(self, variant: "Variant", weights: list[Tensor], costs: Tensor, target: float) -> None:
        self.variant, self.weights, self.target = variant, weights, target
        self.total = sum(w.numel() for w in weights)
        self.floors = [max(1, int(min(w.shape[0], 0.5 * (1 - target) * w.numel()))) for w in weights]

    def sparsity(self, progress: float) -> float:
        return self.target * (1 - (1 - min(progress / END, 1)) ** 3)

    @torch.no_grad()
    def solve(self, progress: float) -> None:
        """Meet the schedule's sparsity."""
        magnitudes = torch.cat([w.abs().flatten() for w in self.weights])
        pruned = int(self.sparsity(progress) * self.total)
        cut = magnitudes.kthvalue(pruned).values if pruned else torch.tensor(-1.0)
        self.masks = []
        for w, floor in zip(self.weights, self.floors, strict=True):
            kept = w.abs().flatten().topk(floor).values[-1] * 0.99999
            self.masks.append((w.abs() > (torch.minimum(cut, kept) if self.variant.floor else cut)).float())

    @torch.no_grad()
    def sparse(self) -> list[Tensor]:
        """Return the weights that the network computes with."""
        for w, mask in zip(self.weights, self.masks, strict=True):
            w.mul_(mask)
        return self.weights

    def learn(self, progress: float, lr: float) -> None:
        """Update the tilt after the optimizer's step."""


class Soft(Magnitude):
    """Soft thresholds exp(tilt + offset)."""

    def __init__(self, variant: "Variant", weights: list[Tensor], costs: Tensor, target: float) -> None:
        super().__init__(variant, weights, costs, target)
        self.rule = variant.rule()
        sizes = torch.tensor([float(w.numel()) for w in weights])
        self.tilt = self.rule.begin(costs / ((sizes * costs).sum() / self.total))
        self.raws = [torch.full((1,), -20.0, requires_grad=True) for _ in weights]

    @torch.no_grad()
    def solve(self, progress: float) -> None:
        critical, caps = [], []
        for w, tilt, floor in zip(self.weights, self.tilt, self.floors, strict=True):
            offsets = w.abs().flatten().log() - tilt  # the weight is pruned from this offset on
            largest = torch.topk(offsets, floor)
            caps.append(largest.values[-1] - 1e-4)
            offsets[largest.indices] = math.inf
            critical.append(offsets)
        critical = torch.cat(critical)
        pruned = self.total - round((1 - self.sparsity(progress)) * self.total)
        offset = critical.kthvalue(pruned).values if pruned else critical.min() - 1
        for raw, tilt, cap in zip(self.raws, self.tilt, caps, strict=True):
            raw.fill_(float(min(offset, cap) + tilt))

    def sparse(self) -> list[Tensor]:
        sparse = []
        for w, raw in zip(self.weights, self.raws, strict=True):
            s = soft_threshold(w, raw, g="exp", gradient=self.variant.gradient)
            if self.variant.rescale:
                s = s * (w.detach().abs().sum() / s.detach().abs().sum().clamp(min=1e-12))
            sparse.append(s)
        return sparse

    @torch.no_grad()
    def learn(self, progress: float, lr: float) -> None:
        self.tilt = self.rule.update(self.tilt, self.weights, self.raws, progress, lr)
        for raw in self.raws:
            raw.grad = None


@dataclass(frozen=True)
class Variant:
    """A variant of the screen: a rule and its options."""

    rule: Callable[[], Rule] = Rule
    gradient: str = "straight_through"
    rescale: bool = False  # survivors times sum|w| / sum|S|, so that the layer keeps its l1 norm
    pruner: type[Magnitude] = Soft
    floor: bool = True  # of survivors per layer, for magnitude pruning; soft thresholds always keep it


MASKED = "masked"
VARIANTS = {
    "dense": Variant(pruner=Magnitude),
    "magnitude": Variant(pruner=Magnitude),
    "magnitude-no-floor": Variant(pruner=Magnitude, floor=False),
    "global-masked": Variant(gradient=MASKED),
    "global-masked-rescaled": Variant(gradient=MASKED, rescale=True),
    "global-ste": Variant(),
    "global-ste-rescaled": Variant(rescale=True),
    "learned-free-masked": Variant(lambda: Sgd(1.0), MASKED),
    "learned-free-ste": Variant(lambda: Sgd(1.0)),
    "learned-slow-masked": Variant(lambda: Sgd(0.1), MASKED),
    "learned-slow-ste": Variant(lambda: Sgd(0.1)),
    "learned-bounded-masked": Variant(lambda: Sgd(0.1, bound=0.5), MASKED),
    "learned-bounded-masked-rescaled": Variant(lambda: Sgd(0.1, bound=0.5), MASKED, rescale=True),
    "learned-bounded-ste": Variant(lambda: Sgd(0.1, bound=0.5)),
    "learned-frozen-masked": Variant(lambda: Sgd(0.1, freeze=0.35), MASKED),
    "learned-frozen-ste": Variant(lambda: Sgd(0.1, freeze=0.35)),
    "learned-bounded-frozen-masked": Variant(lambda: Sgd(0.1, bound=0.5, freeze=0.5), MASKED),
    "surface-weight": Variant(lambda: Surface(0.0)),
    "surface-half": Variant(lambda: Surface(0.5)),
    "surface-half-bounded": Variant(lambda: Surface(0.5, bound=0.5)),
    "surface-flop": Variant(lambda: Surface(1.0)),
    "surface-flop-bounded": Variant(lambda: Surface(1.0, bound=0.5)),
    "fisher-0.5": Variant(lambda: Fisher(0.5)),
    "fisher-0.5-near": Variant(lambda: Fisher(0.5, local=True)),
    "fisher-0.5-flop": Variant(lambda: Fisher(0.5, cost=0.25)),
    "fisher-1": Variant(lambda: Fisher(1.0)),
    "fisher-1-flop": Variant(lambda: Fisher(1.0, cost=0.5)),
    "static-0.1": Variant(lambda: Static(0.1)),
    "static-0.2": Variant(lambda: Static(0.2)),
    "static-0.2-masked": Variant(lambda: Static(0.2), MASKED),
    "static-0.35": Variant(lambda: Static(0.35)),
}


def normalised(images: Images, number: int) -> tuple[Tensor, Tensor]:
    return (images.images[:number].float() / 255 - 0.286) / 0.353, images.labels[:number]


def train(name: str, target: float, seed: int, data: Data, number: int, epochs: int) -> dict:
    """Train once on the first `number` images and return the line for the result file."""
    torch.manual_seed(seed)
    model, generator = network().to(memory_format=torch.channels_last), torch.Generator().manual_seed(seed + 1)
    rows = count(model, IMAGE).covered_rows
    costs = torch.tensor([row.dense_flops / row.params for row in rows])
    names = [f"{row.name}.weight" for row in rows]
    variant = VARIANTS[name]
    pruner = variant.pruner(variant, [model.get_parameter(n) for n in names], costs, target)

    def predict(x: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, pruner.sparse(), strict=True)), x)

    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    images, labels = normalised(data.train, number)
    begin, batches = time.perf_counter(), number // BATCH
    for step in range(epochs * batches):
        progress, batch = step / (epochs * batches), step % batches
        lr = LR * min(1, progress / 0.1) * (0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        if batch == 0:
            order = torch.randperm(number, generator=generator)
        chosen = order[batch * BATCH : (batch + 1) * BATCH]
        x = images[chosen]
        if torch.rand((), generator=generator) < 0.5:
            x = x.flip(3)
        if step % INTERVAL == 0:
            pruner.solve(progress)
        x = x.to(memory_format=torch.channels_last)
        loss = F.cross_entropy(predict(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.learn(progress, lr)
    if isinstance(pruner, Soft):  # magnitude pruning ends with its last masks
        pruner.solve(1.0)
    model.eval()
    with torch.no_grad():
        test = zip(*(part.split(500) for part in normalised(data.test, len(data.test))), strict=True)
        hits = sum((predict(x).argmax(1) == y).sum().item() for x, y in test)
        weights = pruner.sparse()
    nonzeros = [int(w.count_nonzero()) for w in weights]
    sizes = [w.numel() for w in weights]
    flops = sum(n * cost for n, cost in zip(nonzeros, costs, strict=True))
    dense_flops = sum(n * cost for n, cost in zip(sizes, costs, strict=True))
    return {
        "variant": name,
        "target": target,
        "seed": seed,
        "images": number,
        "epochs": epochs,
        "accuracy": hits / len(data.test),
        "sparsity": 1 - sum(nonzeros) / sum(sizes),
        "flops": float(flops / dense_flops),
        "density": [n / size for n, size in zip(nonzeros, sizes, strict=True)],
        "log_thresholds": pruner.tilt.tolist() if isinstance(pruner, Soft) else None,
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the four IDX files of Fashion-MNIST")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--targets", nargs="*", type=float, default=[0.95, 0.99])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RUNS.path)
    parser.add_argument("--table", action="store_true", help="print the screen as a Markdown table and run nothing")
    options = parser.parse_args()
    if options.table:
        print(screen_table())
        return
    torch.set_num_threads(1)
    data = load("fashion-mnist", options.data_dir)
    held = RunFile(options.output, RUNS.key)
    wanted = (
        {"variant": name, "target": 0.0 if name == "dense" else target}
        for target in options.targets
        for name in options.variants
    )
    for run in held.missing(wanted):
        result = train(run["variant"], run["target"], 0, data, options.images, options.epochs)
        held.append(result | {"machine": machine()})
        print("{variant:32s} {target} {accuracy:.4f}, FLOPs {flops:.4f}".format(**result))


if __name__ == "__main__":
    main()
