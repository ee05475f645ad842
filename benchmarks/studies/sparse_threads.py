"""The threads of the kernels under sanitizers: thousands of stages, calls from two threads at once, and forks.

    python -m benchmarks.studies.sparse_threads [--rounds 15] [--name sparse_threads]

The kernels are compiled with ThreadSanitizer, and with AddressSanitizer and UBSan, for threads that spin, yield or
sleep while they wait. Networks run with 2 and 4 threads, on all processors and on one of them, alone and beside a busy
process, and so does the backward of a recurrent layer. Each result must equal that of one thread, gradients but for
rounding, and a sanitizer must have nothing to say. Under ThreadSanitizer the teams of team.c take the place of
libgomp's, whose waits it cannot see. The counts go to benchmarks/results/NAME.json. Linux and gcc only.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.busy_neighbor import busy_neighbor
from benchmarks.timing import write
from str_triton import LowRankLSTM, deploy
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.runtime.segment import Segment

TEAM = Path(__file__).with_name("team.c")
SANITIZERS = {
    "thread": ("tsan", f"-fsanitize=thread -g -Wl,-Bsymbolic {shlex.quote(str(TEAM))}"),
    "address, undefined": ("asan", "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g"),
}
WAITS = {"spin": "", "yield": "-DSPINS=0 -DYIELDS=100000000", "sleep": "-DSPINS=0 -DYIELDS=0"}
OPTIONS = {"TSAN_OPTIONS": "exitcode=0:die_after_fork=0", "ASAN_OPTIONS": "detect_leaks=0"}
# Memory that the system's loader allocates for a thread, threads of torch's own, and its mutexes.
SUPPRESSED = """
race:_dl_deallocate_tls
called_from_lib:libgomp
called_from_lib:libtorch_cpu.so
mutex:libtorch
"""


class Steps(nn.Module):
    """A recurrent layer for one sequence, whose hidden units the threads share."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 160)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


def make_networks(folder: Path) -> None:
    """Save compiled networks whose layers all run by the kernels, with an input each."""
    torch.manual_seed(0)
    image, rows = torch.randn(2, 4, 10, 10), torch.randn(3, 16)
    pixels = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Hardswish()) for _ in range(30)))
    dense = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(30)))
    found = []
    for model, x in ((pixels, image), (dense, rows), (Steps(), torch.randn(40, 1, 8))):
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.data *= torch.rand_like(module.weight) < 0.5
        found.append((deploy.compile_sparse(model.eval(), x, tune=False), x))
    codes = deploy.compile_sparse(deploy.quantize(pixels, [image], bound=1e9), image, tune=False)
    for compiled, _ in found:
        kinds = {
            node.name: "loop_shared" if isinstance(node, Recurrent) else "sparse" for node in compiled.graph.layers()
        }
        compiled.choices = {name: Choice(kind, 1, 4, 2) for name, kind in kinds.items()}
    found.append((codes, image))
    for index, (compiled, x) in enumerate(found):
        compiled.save(folder / f"{index}.sparse")
        torch.save(x, folder / f"{index}.pt")


def stages(network: deploy.SparseModel) -> int:
    """Return how often the threads wait for each other in a call."""
    (plan,) = network._plans.values()
    segments = [part for part in plan.segments if isinstance(part, Segment)]
    steps = sum(plan.shapes[node.name][0] for node in network.graph.layers() if isinstance(node, Recurrent))
    return steps + sum(len(segment.tasks) * segment.groups for segment in segments)


def trained(layer: LowRankLSTM, x: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a layer's parameters."""
    return torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))


def stress(folder: Path, rounds: int) -> dict[str, Any]:
    """Call saved networks from two threads at once, and fork meanwhile; return what was counted."""
    torch.set_num_threads(1)
    paths = sorted(folder.glob("*.sparse"))
    made = [(deploy.load_sparse(path), torch.load(path.with_suffix(".pt"))) for path in paths]
    wanted = [network(x) for network, x in made]
    per_call = [stages(network) for network, _ in made]
    layer = LowRankLSTM(16, 64, max_rank=8, factorize="recurrent")
    layer._execution = lambda *_: "native"  # type: ignore[method-assign]
    sequences = torch.randn(30, 12, 16)
    gradients = trained(layer, sequences)
    counts = {"calls": 0, "backwards": 0, "stages": 0, "forks": 0, "wrong": 0, "wrong in a child": 0}

    def call(threads: int, order: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(rounds):
            pairs = zip(trained(layer, sequences), gradients, strict=True)
            counts["wrong"] += any((found - one).abs().max() > 1e-5 * one.abs().max() for found, one in pairs)
            counts["backwards"] += 1
            for index in range(len(made))[::order]:
                network, x = made[index]
                counts["wrong"] += not torch.equal(network(x), wanted[index])
                counts["calls"] += 1
                counts["stages"] += per_call[index]

    for threads in (2, 4):
        callers = [threading.Thread(target=call, args=(threads, order)) for order in (1, -1)]
        for caller in callers:
            caller.start()
        while any(caller.is_alive() for caller in callers):
            time.sleep(1)
            child = os.fork()
            if child == 0:  # It has one thread, and calls the same networks.
                same = all(torch.equal(network(x), y) for (network, x), y in zip(made, wanted, strict=True))
                os._exit(0 if same else 3)
            counts["wrong in a child"] += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
            counts["forks"] += 1
    return counts


def run(sanitizer: str, wait: str, processors: set[int], rounds: int, folder: Path) -> dict[str, Any]:
    """Run `stress` in a process of its own under a sanitizer."""
    library, flags = SANITIZERS[sanitizer]
    found = [
        subprocess.check_output(["gcc", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in (library, "stdc++")
    ]
    suppressed = folder / "suppressed"
    suppressed.write_text(SUPPRESSED)
    options = OPTIONS | {"TSAN_OPTIONS": f"{OPTIONS['TSAN_OPTIONS']}:suppressions={suppressed}"}
    environment = os.environ | options | {
        "CC": f"gcc {flags} {WAITS[wait]}",
        "LD_PRELOAD": " ".join(found),
        "XDG_CACHE_HOME": str(folder),
    }  # fmt: skip
    command = ["setarch", "-R", sys.executable, "-W", "ignore", "-m", "benchmarks.studies.sparse_threads"]
    command += ["--stress", str(folder), "--rounds", str(rounds)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, processors)
    )
    lines = result.stderr.splitlines()
    reports = [line for line in lines if "Sanitizer" in line or "runtime error" in line]
    if result.returncode or reports:
        print(result.stderr[-6000:], flush=True)
    counted = json.loads(result.stdout) if result.stdout else {}
    return {"status": result.returncode, "reports": len(reports), **counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="calls of each network by each of two threads")
    parser.add_argument("--stress", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="sparse_threads", help="of the result file")
    options = parser.parse_args()
    if options.stress:
        print(json.dumps(stress(options.stress, options.rounds)))
        return
    every, results = os.sched_getaffinity(0), {}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        make_networks(Path(folder))
        for sanitizer in SANITIZERS:
            for wait in WAITS:
                for place, processors in (("alone", every), ("one processor", {min(every)}), ("busy", every)):
                    name = f"{sanitizer}; {wait}; {place}"
                    with busy_neighbor() if place == "busy" else contextlib.nullcontext():
                        results[name] = run(sanitizer, wait, processors, options.rounds, Path(folder))
                    print(name, results[name], flush=True)
    write(options.name, {"runs": results})
    raise SystemExit(
        any(
            any(found[what] for what in ("status", "reports", "wrong", "wrong in a child"))
            for found in results.values()
        )
    )


if __name__ == "__main__":
    main()
