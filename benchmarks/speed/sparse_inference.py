"""The speed of published budgets by `deploy.compile_sparse` on the CPU, beside PyTorch, onnxruntime and deepsparse.

    python -m benchmarks.speed.sparse_inference NETWORK... [--quick] [--rounds 11] [--threads 2] [--until STEP]
        [--deepsparse PYTHON] [--mnn PYTHON] [--before CHECKOUT]

NETWORK is one of mobilenetv1-89.01, resnet50-90.23, resnet50-95.03, resnet50-98.05, or "all": random masks at the
published per-layer budgets, 224x224, batch 1, and larger batches of ours. Three steps, of which those that are done are
not done again while --work has their files: "prepare" (weights, ONNX, what torch.compile makes: not timed), "compile"
(ours, which times the executions of each layer), and "time" (all in turns, medians). The two last need a quiet machine.
PYTHON is that of an environment of its own with `pip install deepsparse==1.8.0` (Python 3.11) or `pip install MNN`;
without it that peer is left out. CHECKOUT is another checkout of this repository, whose compile_sparse is timed beside
ours as "before". Results are merged into benchmarks/results/sparse_inference_PROCESSOR.json, one entry per network;
--quick takes few rounds and writes none.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.sparse_inference_peers import Contender, Peer, compiled, eager, onnx_file, onnxruntime_session
from benchmarks.timing import RESULTS, in_file_names, machine, version
from str_triton import count, deploy
from str_triton.cnn.models import build
from str_triton.cnn.published import layer_sparsities

NETWORKS = {
    f"{model}-{sparsity:.2f}": (model, sparsity)
    for model, sparsity in (("mobilenetv1", 89.01), ("resnet50", 90.23), ("resnet50", 95.03), ("resnet50", 98.05))
}
STEPS = ("prepare", "compile", "time")
OURS = "compile_sparse"
SETTLE = 0.05  # seconds until the threads of the one before no longer spin
WARM, SECONDS = 3, 0.25  # calls of a turn that are not timed, and how long those that are take together, about
QUICK = 3  # rounds of a quick run
BATCHES = {"mobilenetv1": (1, 8, 64), "resnet50": (1, 8)}


def random_network(model_name: str, sparsity: float, example: Tensor) -> nn.Module:
    """Random weights and masks at the published per-layer budget, and batch norms that fit them."""
    torch.manual_seed(0)
    zeros = {layer: percent / 100 for layer, percent in layer_sparsities(model_name, sparsity).items()}
    return with_random_zeros(build(model_name), zeros, example)


def with_random_zeros(model: nn.Module, zeros: Mapping[str, float], example: Tensor) -> nn.Module:
    """Set a share of the weights of each named layer to 0, in random places; fit the batch norms to random images."""
    for layer, share in zeros.items():
        weight = model.get_submodule(layer).weight.data
        weight.view(-1)[torch.randperm(weight.numel())[: round(weight.numel() * share)]] = 0
    # Without statistics of their own the layers' outputs would shrink to denormal numbers, which take longer.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, *example.shape[1:]))
    return model.eval()


def prepare(name: str, work: Path, example: Tensor) -> nn.Module:
    """Make the network, its ONNX file, and its result of torch.compile."""
    weights, onnx = work / f"{name}.pt", work / f"{name}.onnx"
    if weights.exists():
        model = build(NETWORKS[name][0]).eval()
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        model = random_network(*NETWORKS[name], example)
        torch.save(model.state_dict(), weights)
    if not onnx.exists():
        onnx_file(model, example, onnx)
        with torch.inference_mode():
            for function in compiled(model, example).values():
                function()
    return model


def is_current(path: Path) -> bool:
    """Check that a file is there and newer than the code of sparse execution."""
    changed = max(file.stat().st_mtime for file in (Path(deploy.__file__).parent / "sparse").rglob("*.*"))
    return path.exists() and path.stat().st_mtime >= changed


def compile_ours(name: str, work: Path, model: nn.Module, example: Tensor) -> nn.Module:
    """Compile the network with compile_sparse, or load its file if that is newer than the code."""
    path = work / f"{name}.sparse"
    if not is_current(path):
        begin = time.perf_counter()
        network = deploy.compile_sparse(model, example)
        (work / f"{name}.seconds").write_text(f"{time.perf_counter() - begin:.1f}")
        network.save(path)
    return deploy.load_sparse(path)


def fastest(variants: dict[str, Callable[[], Tensor]]) -> tuple[str, Callable[[], Tensor]]:
    """Return the variant whose median over alternating calls is the smallest, and its name."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()
    for _ in range(7):
        for name, function in variants.items():
            function()
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    best = min(variants, key=lambda name: median(seconds[name]))
    return best, variants[best]


def in_turns(contenders: dict[str, Contender], rounds: int, turn: float = SECONDS) -> dict[str, list[float]]:
    """Return the median seconds of a call for each contender and round. Every contender has its turn in a round.

    The timed calls of a turn take `turn` seconds, about.
    """
    calls = {name: max(3, round(turn / contender(WARM))) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            time.sleep(SETTLE)
            contender(WARM)
            seconds[name].append(contender(calls[name]))
    return seconds


def repeated(function: Callable[[], Any]) -> Contender:
    """Return a contender that runs in this process."""

    def turn(calls: int) -> float:
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - begin)
        return median(seconds)

    return turn


def measure(
    name: str, options: argparse.Namespace, model: nn.Module, ours: nn.Module, example: Tensor
) -> dict[str, Any]:
    """Return the entry of one network."""
    work, threads = options.work, options.threads
    expected = model(example)
    session = onnxruntime_session(work / f"{name}.onnx", threads)
    eager_name, eager_call = fastest(eager(model, example))
    compiled_name, compiled_call = fastest(compiled(model, example))
    calls = {
        OURS: lambda: ours(example),
        "eager": eager_call,
        "torch.compile": compiled_call,
        "onnxruntime": lambda: torch.from_numpy(session.run(None, {"images": example.numpy()})[0]),
    }
    contenders = {key: repeated(call) for key, call in calls.items()}
    outputs = {key: call() for key, call in calls.items()}
    versions = {"onnxruntime": version("onnxruntime")}
    with contextlib.ExitStack() as stack:
        for key, python in {"deepsparse": options.deepsparse, "MNN": options.mnn, "before": options.before}.items():
            if python is not None:
                peer = _peer(key, python, name, work, threads, example)
                stack.callback(peer.close)
                contenders[key], outputs[key], versions[key] = peer.turn, peer.output, peer.version
        seconds = in_turns(contenders, options.rounds)
    budget = count(model, example)
    return {
        "machine": {**machine(), **versions},
        "sparsity": budget.sparsity,
        "flops": budget.flops,
        "batch": 1,
        "image": list(example.shape[1:]),
        "threads": threads,
        "rounds": options.rounds,
        "variants": {"eager": eager_name, "torch.compile": compiled_name},
        "milliseconds": {key: 1e3 * median(values) for key, values in seconds.items()},
        "quickest_milliseconds": {key: 1e3 * min(values) for key, values in seconds.items()},
        "times_as_fast": {key: ratio(values, seconds[OURS]) for key, values in seconds.items() if key != OURS},
        "largest_difference": {key: float((output - expected).abs().max()) for key, output in outputs.items()},
        "largest_score": float(expected.abs().max()),
        "compile_seconds": float((work / f"{name}.seconds").read_text()),
        "milliseconds_an_image": per_image(ours, BATCHES[NETWORKS[name][0]], options.rounds),
        "share_of_time": shares(model, ours, example),
        "layers": ours.table().splitlines(),
    }


def _peer(key: str, python: str, name: str, work: Path, threads: int, example: Tensor) -> Peer:
    if key == "before":
        network = f"{(work / f'{name}.pt').resolve()},{NETWORKS[name][0]}"
        checkout = Path(python).resolve()
        peer = Peer(key, sys.executable, network, threads, example, work, path=str(checkout))
        if not Path(peer.version).resolve().is_relative_to(checkout):
            peer.close()
            raise SystemExit(f"--before {python}: {peer.version} was imported instead")
        commit = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        peer.version = subprocess.run(commit, check=True, capture_output=True, text=True).stdout.strip()
        return peer
    return Peer(key, python, str(work / f"{name}.onnx"), threads, example, work)


def per_image(ours: nn.Module, batches: Sequence[int], rounds: int) -> dict[str, float]:
    """Return our milliseconds an image at several sizes of a batch."""
    images = {size: torch.randn(size, 3, 224, 224) for size in batches}
    contenders = {str(size): repeated(functools.partial(ours, x)) for size, x in images.items()}
    return {size: 1e3 * median(values) / int(size) for size, values in in_turns(contenders, rounds).items()}


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Return how many times as fast ours is: the median, over the rounds, of their time divided by ours."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def shares(model: nn.Module, ours: nn.Module, example: Tensor, rounds: int = 9) -> dict[str, float]:
    """Return the share of time of each kind of step in ours. Steps are measured one by one."""
    profiles = [ours.profile(example) for _ in range(rounds)]
    spent: dict[str, float] = defaultdict(float)
    for steps in zip(*profiles, strict=True):
        layer, kind, _ = steps[0]
        if kind == "convolution":
            kind = "{}x{} convolution".format(*model.get_submodule(layer).kernel_size)
        spent[kind] += median(milliseconds for *_, milliseconds in steps)
    total = sum(spent.values())
    return {kind: part / total for kind, part in sorted(spent.items(), key=lambda item: -item[1])}


def result_file(processor: str) -> Path:
    """Return where the results of a machine with this processor stand."""
    return RESULTS / f"sparse_inference_{in_file_names(processor)}.json"


def merge(name: str, entry: dict[str, Any]) -> None:
    """Put one network's entry into the result file of this machine."""
    path = result_file(entry["machine"]["processor"])
    content = (json.loads(path.read_text()) if path.exists() else {}) | {name: entry}
    path.write_text(json.dumps({key: content[key] for key in NETWORKS if key in content}, indent=2) + "\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=[*NETWORKS, "all"], metavar="NETWORK")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--deepsparse", metavar="PYTHON")
    parser.add_argument("--mnn", metavar="PYTHON")
    parser.add_argument("--before", metavar="CHECKOUT")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step to do")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/sparse_inference"), help="where steps leave their files"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((options.work / "inductor").resolve())
    torch.set_num_threads(options.threads)
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    if options.quick:
        options.rounds = QUICK
    for name in NETWORKS if "all" in options.networks else options.networks:
        with torch.no_grad():
            run(name, options, example)


def run(name: str, options: argparse.Namespace, example: Tensor) -> None:
    """Do the steps for one network, and print what was measured."""
    model = prepare(name, options.work, example)
    if options.until == "prepare":
        return
    ours = compile_ours(name, options.work, model, example)
    if options.until == "compile":
        return
    entry = measure(name, options, model, ours, example)
    print(f"{name} on {entry['machine']['processor']}, compiled in {entry['compile_seconds']} s")
    for key, milliseconds in entry["milliseconds"].items():
        times = f"{entry['times_as_fast'][key]:.2f} x" if key != OURS else ""
        print(f"{key:15s} {milliseconds:8.2f} ms  {times:8s} differs by {entry['largest_difference'][key]:.1e}")
    sizes = entry["milliseconds_an_image"]
    print("an image in a batch of", ", ".join(f"{size}: {milliseconds:.2f} ms" for size, milliseconds in sizes.items()))
    print(", ".join(f"{kind} {100 * share:.0f} %" for kind, share in entry["share_of_time"].items()))
    if not options.quick:
        merge(name, entry)


if __name__ == "__main__":
    main()
