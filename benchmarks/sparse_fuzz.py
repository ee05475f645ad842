"""Random networks through `deploy.compile_sparse`, against eager PyTorch in float64.

    python -m benchmarks.sparse_fuzz [--first 0] [--count 2000]

Each seed is a network of random layers, norms, activations, residual sums, concatenations, gates, changes in place,
masks and state, with random zeros; every layer's execution is drawn at random. It is compared for the example, for
other batches and for other sizes, saved and loaded. Under AddressSanitizer and UBSan, for the part in C:

    CC="gcc -fsanitize=address,undefined -fno-sanitize-recover=undefined -g" ASAN_OPTIONS=detect_leaks=0
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)" XDG_CACHE_HOME=runs/asan
    python -m benchmarks.sparse_fuzz
"""

import argparse
import copy
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton import deploy
from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice

TOLERANCE = 1e-4  # of the largest value, at least of 1
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "clamp": lambda x: x.clamp(-1.0, 2.0),
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "relu_": lambda x: F.relu_(x * 1.0),
    "tanh": torch.tanh,
}


class Attention(nn.Module):
    """Self-attention over the pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        tokens = tokens + self.out(F.scaled_dot_product_attention(q, k, v))
        return tokens.transpose(1, 2).reshape(x.shape)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, keep: bool) -> None:
        super().__init__()
        self.down, self.up, self.keep = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), keep

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True) if self.keep else F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(mean))))


class RandomNetwork(nn.Module):
    """A network that a random generator draws, [B, 3, H, W] -> a tensor, a tuple or a dict."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.steps: list[tuple[str, str]] = []
        self.parts = nn.ModuleDict()
        channels = 3
        for index in range(draw.randint(2, 9)):
            kind = draw.choice(
                (
                    "conv",
                    "conv",
                    "conv",
                    "conv",
                    "norm",
                    "act",
                    "residual",
                    "concat",
                    "gate",
                    "change",
                    "pool",
                    "attend",
                    "mask",
                )
            )
            name = f"{kind}{index}"
            made, channels = self._part(kind, channels, draw)
            if made is not None:
                self.parts[name] = made
            detail = {
                "act": draw.choice(list(ACTIVATIONS)),
                "change": draw.choice(("narrow", "index", "select")),
                "pool": draw.choice(("max", "mean")),
            }
            self.steps.append((name, detail.get(kind, "")))
        self.head = nn.Linear(channels, 5) if draw.random() < 0.6 else None
        self.result = draw.choice(("tensor", "tuple", "dict"))
        self.counts = draw.random() < 0.2
        self.register_buffer("calls", torch.zeros(()))

    def _part(self, kind: str, channels: int, draw: random.Random) -> tuple[nn.Module | None, int]:
        if kind == "conv":
            out = draw.choice((4, 6, 8, 12, 16))
            groups = draw.choice([g for g in (1, 1, 1, 2, 4, channels) if channels % g == 0 and out % g == 0] or [1])
            kernel = (draw.choice((1, 1, 3, 3, 5)), draw.choice((1, 3, 3)))
            dilation = draw.choice((1, 1, 1, 2))
            stride = draw.choice((1, 1, 1, 2, 3))
            mode = draw.choice(("zeros", "zeros", "zeros", "reflect"))
            padding = (
                "same"
                if stride == 1 and mode == "zeros" and draw.random() < 0.2
                else (draw.randint(0, 2), draw.randint(0, 2))
            )
            options = {"groups": groups, "bias": draw.random() < 0.5, "padding_mode": mode, "dilation": dilation}
            return nn.Conv2d(channels, out, kernel, stride, padding, **options), out
        if kind == "norm":
            norms = (
                lambda c: nn.BatchNorm2d(c),
                lambda c: nn.BatchNorm2d(c, affine=False),
                lambda c: nn.GroupNorm(1, c),
                lambda c: nn.InstanceNorm2d(c),
            )
            return draw.choice(norms)(channels), channels
        if kind in ("residual", "concat"):
            conv = nn.Conv2d(channels, channels, draw.choice((1, 3)), padding="same", bias=draw.random() < 0.5)
            inner = nn.Sequential(conv, nn.BatchNorm2d(channels)) if draw.random() < 0.5 else conv
            return inner, channels * (2 if kind == "concat" else 1)
        if kind == "gate":
            return Gate(channels, draw.random() < 0.5), channels
        return (Attention(channels), channels) if kind == "attend" else (None, channels)

    def forward(self, x: Tensor) -> Tensor | tuple | dict:
        for name, detail in self.steps:
            x = self._step(name, detail, x)
        if self.counts:
            self.calls += 1
            x = x * self.calls
        y = x.mean((2, 3)) if self.head is None else self.head(x.mean((2, 3)))
        return {"tensor": y, "tuple": (y, x), "dict": {"scores": y, "parts": [x, y.argmax(1) * 0]}}[self.result]

    def _step(self, name: str, detail: str, x: Tensor) -> Tensor:
        part = dict(self.parts.items()).get(name)
        if name.startswith("residual"):
            return F.relu(x + part(x))
        if name.startswith("concat"):
            return torch.cat([x, part(x)], 1)
        if part is not None:
            return part(x)
        if name.startswith("act"):
            return ACTIVATIONS[detail](x)
        if name.startswith("mask"):
            return x.masked_fill(x > 1.0, 0.5)
        if name.startswith("pool"):
            small = min(x.shape[2:]) < 4
            return x if small else F.max_pool2d(x, 3, 2, 1) if detail == "max" else F.avg_pool2d(x, 2)
        y = x * 1.0
        if detail == "narrow":
            y.narrow(1, 0, 2).add_(1.0)
        elif detail == "select":
            y.select(1, 1).mul_(3.0)
        else:
            y[:, :, 0] = 2.0
        return y


def network(seed: int) -> tuple[RandomNetwork, tuple[int, ...]]:
    """Return the network of a seed, with random zeros, and the shape of an example."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = RandomNetwork(draw)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= torch.rand_like(module.weight) < draw.choice((0.05, 0.3, 1.0))
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    return model.eval(), (draw.randint(1, 3), 3, draw.randint(14, 26), draw.randint(14, 26))


def forced(compiled: deploy.SparseModel, draw: random.Random) -> None:
    """Draw the execution of every layer."""
    for name in compiled.choices:
        cut = draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 4)
        # Three quarters by the kernels: an execution that does not fit is theirs, too.
        node = next(node for node in compiled.graph.layers() if node.name == name)
        shapes = dict.fromkeys((*node.inputs, name), (1, 1, 1, 1))
        fitting = [key for key, execution in EXECUTIONS.items() if execution.by_kernels or execution.fits(node, shapes)]
        compiled.choices[name] = Choice(draw.choice([*fitting, "sparse", "sparse", "sparse"]), *cut)
    compiled._plans.clear()


def check(seed: int) -> str | None:
    """Return what is wrong with the compiled network of a seed; None if nothing is."""
    model, shape = network(seed)
    draw = random.Random(-seed)
    try:
        with torch.no_grad():
            copy.deepcopy(model)(torch.zeros(shape))
    except RuntimeError:  # An image that is too small for its layers.
        return None
    compiled = deploy.compile_sparse(model, torch.randn(shape), tune=False)
    if not isinstance(compiled, deploy.SparseModel):
        return f"it is a {type(compiled).__name__}: {compiled.notes}"
    forced(compiled, draw)
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "net")
        loaded = deploy.load_sparse(Path(folder) / "net")
    exact = copy.deepcopy(model).double()
    for batch, height, width in (
        shape[:1] + shape[2:],
        (shape[0] + 2, *shape[2:]),
        (1, 31, 17),
        (2, 40, 40),
        shape[:1] + shape[2:],
    ):
        x = torch.randn(batch, 3, height, width)
        try:
            with torch.no_grad():
                wanted = exact(x.double())
        except RuntimeError:  # It is too small for the layers.
            continue
        for name, made in (("compiled", compiled), ("loaded", loaded)):
            try:
                found = made(x.clone())
            except ValueError as error:
                if name == "loaded" and "compiled for" in str(error):  # It holds one branch alone.
                    loaded.reset(compiled.state())
                    continue
                raise
            if problem := differs(found, wanted):
                return f"{name} for {tuple(x.shape)}: {problem}"
        if compiled.state() and not loaded.state().keys():
            return "the loaded network has no state"
    return None


def differs(found: object, wanted: object) -> str | None:
    """Return how two results differ."""
    ours, theirs = (torch.utils._pytree.tree_leaves(result) for result in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return f"shape {tuple(a.shape)}, not {tuple(b.shape)}"
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        if not torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE * scale):
            return f"off by {float((a.double() - b.double()).abs().max()):.2g}, values up to {scale:.2g}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong = 0
    for seed in range(options.first, options.first + options.count):
        try:
            problem = check(seed)
        except Exception as error:  # Whatever it is, it is what this looks for.
            problem = f"{type(error).__name__}: {error}"
        if problem:
            wrong += 1
            print(f"seed {seed}: {problem}", flush=True)
        elif seed % 10 == 9:
            print(f"{seed + 1 - options.first} networks, {wrong} wrong", flush=True)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
