"""Resources of a GPU that the Triton kernels take, found without one: registers, spills, shared memory, widest access.

    python -m benchmarks.speed.kernel_resources [--all] [--json PATH]

The launchers themselves are run, on CPU tensors, where a launch compiles for the target and stops there: so types,
alignments and constants are those of a real launch. To add a kernel, add launches of it to kernel_launches.py.

With --json each launch is kept in PATH.partial.jsonl as soon as it is compiled. Started again after a kill, the command
compiles what is missing, unless the code of kernels or launchers has changed.
"""

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction

from benchmarks.runs import Run, RunFile
from benchmarks.speed.kernel_launches import Launch, launches
from str_triton.files import write_atomically
from str_triton.ops import low_rank_gpu, soft_threshold_many

ROOT = Path(__file__).parents[2]
TARGETS = {
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
CHIPS = {"gfx942": "cdna", "gfx1100": "rdna"}
# KiB that one program may take.
KIB = {"sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx1100": 64}
SHARED_MEMORY = {target: 1024 * kib for target, kib in KIB.items()}
PTX = {"load": "ld", "store": "st"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel in one variant. Spills: bytes of local memory per thread (NVIDIA) or registers (AMD)."""

    kernel: str
    variant: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    loop: int | None  # instructions of a time loop's step (NVIDIA); None: not counted
    exponentials: int
    barriers: int
    dots: str  # the kinds of matrix instructions


# ---- compilation without a GPU ------------------------------------------------------------------------------------


class _Driver:
    """As much of a GPU driver as it takes to compile for a GPU that is not there."""

    def __init__(self, target: str, device: str):
        self.target, self.device = target, device

    def get_current_device(self) -> str:
        return self.device  # Only a key of the kernels' caches.

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]


def _translate(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> str:
    """Return a kernel in Triton's first intermediate code. Takes the place of `triton.compiler.compile`."""
    backend, context = make_backend(target), ir.context()
    parsed = backend.parse_options(options | source.parse_options())
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    return str(source.make_ir(target, parsed, functions, modules, context))


@contextmanager
def compiling_for(target: str, translate_only: bool = False) -> Iterator[list[CompiledKernel]]:
    """Make launches inside the context only compile, and add what they compiled to the list.

    translate_only: stop after Triton's own frontend, whose errors the interpreter does not show, and add its code. This
    takes a fifth of a second, a compilation many.
    """
    compiled: list[CompiledKernel] = []
    launch = JITFunction.run
    compiler = _translate if translate_only else triton.compiler.compile

    def compile_only(kernel: JITFunction, *args: Any, **options: Any) -> None:
        kernel.compile = compiler  # A kernel keeps the one of the last target that was new to it.
        compiled.append(launch(kernel, *args, **options | {"warmup": True}))

    no_gpu = SimpleNamespace(active=_Driver(target, f"{target}, translated" if translate_only else target))
    with (
        mock.patch("triton.compiler.compile", compiler),
        mock.patch("triton.runtime.jit.driver", no_gpu),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(low_rank_gpu, "shared_memory_limit", return_value=SHARED_MEMORY[target]),
        mock.patch.object(low_rank_gpu, "chip", return_value=CHIPS.get(target, "nvidia")),
    ):
        yield compiled


def builds(target: str, launches: Iterable[Launch]) -> list[tuple[str, CompiledKernel]]:
    """Return the variant and the code of every kernel that the launches start, each code once."""
    found: dict[str, tuple[str, CompiledKernel]] = {}
    for variant, launch in launches:
        with compiling_for(target) as compiled:
            soft_threshold_many._written.cache_clear()  # The kernel that writes tables is launched for new ones alone.
            soft_threshold_many._layout_tables.cache_clear()
            launch()
        for kernel in compiled:
            found.setdefault(kernel.hash, (variant, kernel))
    return list(found.values())


# ---- what the code takes ------------------------------------------------------------------------------------------


def resources(target: str, variant: str, kernel: CompiledKernel, loop: bool = True) -> Resources:
    """Measure a kernel, without the length of its time loop unless `loop`: to disassemble it takes half a second."""
    registers, spills = _amd_registers(kernel) if "amdgcn" in kernel.asm else _nvidia_registers(kernel)
    return Resources(
        kernel.metadata.name,
        variant,
        target,
        kernel.metadata.num_warps,
        registers,
        spills,
        kernel.metadata.shared,
        max(access_bits(kernel, "load"), default=0),
        max(access_bits(kernel, "store"), default=0),
        longest_loop(kernel) if loop else None,
        *(len(re.findall(pattern, _code(kernel))) for pattern in (r"ex2\.|v_exp_f32", r"bar\.sync|s_barrier\b")),
        ", ".join(dots(kernel)),
    )


def _code(kernel: CompiledKernel) -> str:
    return kernel.asm["amdgcn" if "amdgcn" in kernel.asm else "ptx"]


def dots(kernel: CompiledKernel) -> list[str]:
    """Return the kinds of matrix instructions in the code; none: products are made of single multiplications."""
    kinds = r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*|v_(?:mfma|wmma)_\w+"
    return sorted(set(re.findall(kinds, _code(kernel))))


def longest_loop(kernel: CompiledKernel) -> int:
    """Return how many instructions the longest jump backwards spans; 0 on AMD and of other kernels than time loops."""
    if "cubin" not in kernel.asm or not kernel.metadata.name.startswith("low_rank_rnn"):
        return 0
    instructions = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", _cuobjdump("-sass", kernel))
    jumps = ((int(at, 16), re.search(r"BRA.* 0x([0-9a-f]+)", text)) for at, text in instructions)
    return max((at - int(to[1], 16) for at, to in jumps if to), default=0) // 16


def _cuobjdump(option: str, kernel: CompiledKernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def _nvidia_registers(kernel: CompiledKernel) -> tuple[int, int]:
    usage = _cuobjdump("-res-usage", kernel)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd_registers(kernel: CompiledKernel) -> tuple[int, int]:
    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", kernel.asm["amdgcn"])[1])

    return value("vgpr_count"), value("vgpr_spill_count") + value("sgpr_spill_count")


def access_bits(kernel: CompiledKernel, kind: str) -> list[int]:
    """Return the width of every load or store of global memory in the code."""
    if "amdgcn" in kernel.asm:
        widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
        found = re.findall(rf"(?:global|buffer)_{kind}_(dwordx\d|dword|u?short)", kernel.asm["amdgcn"])
        return [widths[name] for name in found]
    found = re.findall(rf"{PTX[kind]}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", kernel.asm["ptx"])
    return [int(count or 1) * int(bits) for count, bits in found]


def code() -> str:
    """Return a digest of what decides the compiled code: kernels, launchers, launches, and triton's version."""
    files = [*(ROOT / "str_triton/kernels").glob("*.py"), *(ROOT / "str_triton/ops").rglob("*.py")]
    digest = hashlib.sha256(triton.__version__.encode())
    for file in sorted([*files, *Path(__file__).parent.glob("kernel_*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def measure(run: Run) -> Run:
    """Compile the launch of this number for a target, and add its seconds and the kernels' resources to the run."""
    begin, target = time.monotonic(), run["target"]
    variant, launch = launches(run["all"])[run["launch"]]
    kernels = [{"hash": k.hash} | asdict(resources(target, name, k)) for name, k in builds(target, [(variant, launch)])]
    return run | {"variant": variant, "seconds": round(time.monotonic() - begin, 1), "kernels": kernels}


def measure_all(wanted: list[Run], progress: RunFile) -> list[Resources]:
    """Measure what the file does not hold, in two processes, and return the resources of every code once.

    SystemExit: some launches do not compile; all others are in the file by then.
    """
    failed = []
    if missing := list(progress.missing(wanted)):
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            runs = {pool.submit(measure, run): run for run in missing}
            for future in as_completed(runs):
                if error := future.exception():
                    failed.append(f"launch {runs[future]['launch']} for {runs[future]['target']}: {error}")
                    print(failed[-1], flush=True)
                    continue
                run = future.result()
                progress.append(run)
                print(f"{run['seconds']:7.1f} s  {run['target']:8} {run['variant']}", flush=True)
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} launches do not compile:", *failed]))
    found = {(run["code"], run["target"], run["launch"]): run["kernels"] for run in progress.read()}
    once: dict[tuple[str, str], dict[str, Any]] = {}
    for run in wanted:
        for row in found[run["code"], run["target"], run["launch"]]:
            once.setdefault((run["target"], row["hash"]), {name: row[name] for name in row if name != "hash"})
    return [Resources(**row) for row in once.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--all", action="store_true", help="every variant, not only those that differ most (an hour)")
    args = parser.parse_args()
    common, numbers = {"code": code(), "all": args.all}, range(len(launches(args.all)))
    wanted = [{**common, "target": target, "launch": number} for target, number in product(TARGETS, numbers)]
    with tempfile.TemporaryDirectory() as folder:
        path = args.json or Path(folder, "resources")
        progress = RunFile(path.with_name(path.name + ".partial.jsonl"), ("code", "all", "target", "launch"))
        rows = measure_all(wanted, progress)
    columns = ("registers", "spills", "shared", "load_bits", "store_bits", "loop", "exponentials", "barriers")
    print(f"{'kernel':42} {'target':7}" + "".join(f"{column:>13}" for column in columns) + "  variant")
    for row in sorted(rows, key=lambda row: (row.kernel, row.target, row.variant)):
        print(
            f"{row.kernel:42} {row.target:7}" + "".join(f"{getattr(row, c):13}" for c in columns) + f"  {row.variant}"
        )
    if args.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        text = json.dumps({"versions": versions, "kernels": [asdict(row) for row in rows]}, indent=2) + "\n"
        write_atomically(args.json, text)
        progress.path.unlink()


if __name__ == "__main__":
    main()
