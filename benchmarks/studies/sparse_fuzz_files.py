"""Files of compiled networks that somebody changed, with the right checksums: each is refused in one line, or right.

    python -m benchmarks.studies.sparse_fuzz_files [--count 1000] [--name sparse_fuzz]

Mutated: any value in the record of a network, or a tensor, is replaced, removed or doubled at random. Crafted: what
somebody would write who knows the format. A file that loads must give, by its kernels, what its graph gives by torch.
The counts are added to benchmarks/results/NAME.json; sparse_fuzz.py says how to run under sanitizers.
"""

import argparse
import copy
import itertools
import json
import random
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.studies.sparse_fuzz import forced, sanitizers
from benchmarks.studies.sparse_fuzz_recurrent import MinimalGatedUnit
from benchmarks.timing import RESULTS, write
from str_triton import LowRankFastGRNN, LowRankGRU, deploy

Record = dict[str, Any]
SECONDS = 20  # of the processor, for one file
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 2**31, -(2**63), 2**70, 1e308, -0.5, "", "x", "0", "conv2d", "sparse", "csr",
    "ops.aten.relu_.default", "ops.aten.from_file.default", "ops.aten.empty.memory_format", "operator.getitem", [],
    [[]], [1, 2], {}, {"tuple": []},
    {"tuple": [0, 0]}, {"tuple": [1, 1]}, {"tuple": [10**6, 10**6]}, {"ref": "nothing"},
    {"tensor": "nothing"}, {"float": "nan"}, {"float": "inf"}, {"dtype": "int64"}, {"dtype": "float64"},
    {"slice": [0, 1, None]}, {"dict": {}}, {"device": "cpu"}, {"layout": "strided"}, {"format": "channels_last"},
]  # fmt: skip


class Pixels(nn.Module):
    """Convolutions, a pool, a residual sum, a gate, state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls += 1
        y = F.relu(self.first(x))
        y = F.max_pool2d(F.relu(y + self.second(y)), 3, 2, 1)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return {"scores": self.head(y.mean((2, 3))) + self.calls, "map": (y, None)}


class Tokens(nn.Module):
    """Embeddings, attention, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        return self.block(self.embedding(ids) * scale) @ self.embedding.weight.t()


class Steps(nn.Module):
    """Recurrent layers of every cell: low-rank and dense, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = LowRankGRU(6, 8, max_rank=3, batch_first=True), nn.LSTM(8, 5, bidirectional=True)
        self.fast, self.minimal = LowRankFastGRNN(10, 7, max_rank=3), MinimalGatedUnit(7, 6, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.gru(x, h)
        y = self.fast(self.lstm(y.transpose(0, 1))[0])[0]
        return self.minimal(y)[0], h


class ByteSteps(Steps):
    """The same with int8 recurrent matrices."""


class Codes(nn.Module):
    """Convolutions, a residual sum, a pool, a mean and a linear layer, for 8-bit integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.head = nn.Conv2d(8, 4, 1), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.first(x))
        y = F.max_pool2d(F.relu(y + self.second(y)), 2)
        return self.head(self.third(y).flatten(1)), y.mean((2, 3))


def networks(folder: Path) -> list[tuple[Record, dict[str, Tensor], tuple]]:
    """Return the records, tensors and example arguments of networks, their executions forced to the kernels."""
    found = []
    torch.manual_seed(0)
    image = torch.randn(2, 3, 12, 12)
    for model, example in (
        (Pixels(), (image,)),
        (Steps(), (torch.randn(2, 5, 6), torch.randn(1, 2, 8))),
        (Codes(), (image,)),
        (ByteSteps(), (torch.randn(2, 5, 6), torch.randn(1, 2, 8))),
        (Tokens(), (torch.randint(11, (2, 5)), torch.ones(()))),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)), (torch.randn(4, 6),)),
    ):
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.data *= torch.rand_like(module.weight) < 0.4
        model.eval()
        made = deploy.quantize(model, [example], bound=1e9) if isinstance(model, Codes | ByteSteps) else model
        compiled = deploy.compile_sparse(made, example, tune=False)
        forced(compiled, random.Random(3))
        compiled.save(folder / "net")
        found.append((deploy.inspect(folder / "net").metadata["sparse"], deploy.unpack(folder / "net"), example))
    return found


def paths(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the way to every value in a record."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def place(tree: Any, path: tuple) -> Any:
    """Return the value at the end of a way."""
    for key in path:
        tree = tree[key]
    return tree


def mutate(record: Record, tensors: dict[str, Tensor], draw: random.Random) -> tuple[Record, dict[str, Tensor]]:
    """Change one to three values of a record, or a tensor."""
    record, tensors = copy.deepcopy(record), dict(tensors)
    if draw.random() < 0.15:
        name = draw.choice(list(tensors))
        changes: list[Callable[[Tensor], Tensor]] = [
            lambda t: t[:-1] if t.dim() and len(t) > 1 else t.reshape(-1),
            lambda t: t.double(),
            lambda t: t.flatten(),
            lambda t: torch.cat([t, t]) if t.dim() else t[None],
            lambda t: torch.full_like(t, 127),
            lambda t: t.to(torch.int64),
            lambda t: t * float("nan") if t.is_floating_point() else t,
        ]
        tensors[name] = draw.choice(changes)(tensors[name]).contiguous()
        return record, tensors
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        every = [path for path in paths(record) if path]
        *path, last = draw.choice(every)
        parent = place(record, tuple(path))
        match draw.choice(("strange", "strange", "strange", "other", "number", "remove", "double")):
            case "other":
                parent[last] = copy.deepcopy(place(record, draw.choice(every)))
            case "number" if type(parent[last]) is int:
                parent[last] += draw.choice((-1, 1, 3, 64, 2**20, -(2**40)))
            case "remove":
                del parent[last]
            case "double" if isinstance(parent, list):
                parent.insert(draw.randint(0, len(parent)), copy.deepcopy(parent[last]))
            case _:
                parent[last] = copy.deepcopy(draw.choice(STRANGE))
    return record, tensors


def outcome(record: Record, tensors: dict[str, Tensor], example: tuple, path: Path) -> str:
    """Return "refused", "right" or "refused at the call"; anything else is a fault and says which."""
    deploy.pack(tensors, path, metadata={"sparse": record}, plain_zeros=True)
    try:
        loaded = deploy.load_sparse(path)
    except ValueError as error:
        return "refused" if "\n" not in str(error) else f"refused in several lines: {error}"
    inputs = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    torch.manual_seed(0)
    try:
        wanted, _ = copy.deepcopy(loaded.graph).run([leaf.clone() for leaf in inputs])
    except Exception as error:
        wanted = error
    torch.manual_seed(0)
    try:
        found = loaded(*(leaf.clone() for leaf in example))
    except (ValueError, TypeError) as error:
        return "refused at the call" if "\n" not in str(error) else f"refused in several lines: {error}"
    except Exception as error:
        if isinstance(wanted, Exception):
            return "refused at the call"
        return f"{type(error).__name__}: {error}"
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(wanted)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and not torch.allclose(a.double(), b.double(), 1e-4, 1e-4, equal_nan=True):
            return f"off by {float((a.double() - b.double()).abs().max()):.2g}"
    return "right"


def run(cases: Iterator[tuple[str, Record, dict[str, Tensor], tuple]]) -> tuple[Counter[str], dict[str, str]]:
    """Return how often each outcome came, and the faults by the names of their cases."""
    outcomes, wrong = Counter(), {}

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} seconds")

    signal.signal(signal.SIGPROF, late)
    with tempfile.TemporaryDirectory() as folder:
        for name, record, tensors, example in cases:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                found = outcome(record, tensors, example, Path(folder) / "changed")
            except Exception as error:  # Whatever it is, it is what this looks for.
                found = f"{type(error).__name__}: {error}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            outcomes[found if found in ("refused", "refused at the call", "right") else "wrong"] += 1
            if found not in ("refused", "refused at the call", "right"):
                wrong[name] = found
                print(f"{name}: {found[:300]}", flush=True)
    return outcomes, wrong


def main() -> None:
    from benchmarks.studies import sparse_fuzz_crafted, sparse_fuzz_crafted_layers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="of mutated files")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--name", default="sparse_fuzz", help="of the result file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        made = networks(Path(folder))
    numbers = range(options.first, options.first + options.count)
    mutated = (
        (f"mutated {i}", *mutate(*made[i % len(made)][:2], random.Random(i)), made[i % len(made)][2]) for i in numbers
    )
    written = itertools.chain(
        sparse_fuzz_crafted.crafted(*made[0]),
        sparse_fuzz_crafted_layers.crafted(sparse_fuzz_crafted_layers.RECURRENT, *made[1]),
        sparse_fuzz_crafted_layers.crafted(sparse_fuzz_crafted_layers.INTEGERS, *made[2]),
        sparse_fuzz_crafted_layers.crafted(sparse_fuzz_crafted_layers.BYTE_STEPS, *made[3]),
    )
    results = {}
    for kind, cases in (("mutated", mutated), ("crafted", written)):
        outcomes, wrong = run(cases)
        results[kind] = {"files": outcomes.total(), "outcomes": dict(outcomes), "wrong": wrong}
        print(kind, dict(outcomes), flush=True)
    path = RESULTS / f"{options.name}.json"
    content = json.loads(path.read_text()) if path.exists() else {"machine": {}}
    content["files"] = [*content.get("files", []), {"sanitizers": sanitizers(), **results}]
    write(options.name, {name: value for name, value in content.items() if name != "machine"})
    raise SystemExit(any(found["wrong"] for found in results.values()))


if __name__ == "__main__":
    main()
