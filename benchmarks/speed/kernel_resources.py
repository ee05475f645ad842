"""What every Triton kernel takes of a GPU, found out without one: registers, spills, shared memory, widest access.

    python -m benchmarks.speed.kernel_resources [--all] [--json PATH]

The launchers themselves are run, on CPU tensors, where a launch compiles for the target and stops there: so types,
alignments and constants are those of a real launch. To add a kernel, add launches of it to `launches`.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from str_triton.ops import low_rank_gpu, radix_select, singular_value_threshold, soft_threshold, soft_threshold_many
from str_triton.ops.low_rank_cell import CELLS
from str_triton.ops.low_rank_plan import saved_shape

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
    """What one kernel takes in one variant. Spills: bytes of local memory per thread (NVIDIA) or registers (AMD)."""

    kernel: str
    variant: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    loop: int  # instructions of a time loop's step (NVIDIA)
    exponentials: int
    barriers: int
    dots: str  # the kinds of matrix instructions


# ---- the launches -------------------------------------------------------------------------------------------------

Launch = tuple[str, Callable[[], Any]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def launches(all_variants: bool = True) -> list[Launch]:
    """Yield the launches of all kernels, in the variants that differ most: a name, and a call of the launcher."""
    return [
        *soft_threshold_launches(all_variants),
        *singular_value_threshold_launches(),
        *radix_select_launches(all_variants),
        *low_rank_launches(every_size() if all_variants else REPRESENTATIVE),
    ]


def soft_threshold_launches(all_variants: bool) -> Iterator[Launch]:
    for dtype, aligned in product(("float32", "bfloat16"), (True, False)):
        yield from _soft_threshold_launches(dtype, "row", aligned)
    yield from _soft_threshold_launches("float32", "weight", aligned=True)
    if all_variants:
        for dtype, granularity in product(("float16", "float64"), ("row", "weight")):
            yield from _soft_threshold_launches(dtype, granularity, aligned=True)
        yield from _soft_threshold_launches("float32", "weight", aligned=False)


def _soft_threshold_launches(dtype: str, granularity: str, aligned: bool) -> Iterator[Launch]:
    x = _tensor((2, 64), DTYPES[dtype], aligned)
    compute = torch.promote_types(x.dtype, torch.float32)
    alpha = _tensor((2, 1) if granularity == "row" else (2, 64), compute, aligned)
    out, flat, xs, thresholds = torch.zeros_like(x), x.new_zeros(256), [x, x], [alpha.numel()] * 2
    joined = torch.zeros(2 * alpha.numel(), dtype=compute)
    variant = f"{dtype}, per {granularity}, {'aligned' if aligned else 'misaligned'}"
    yield variant, partial(soft_threshold._forward_triton, x, alpha)
    yield variant, partial(soft_threshold_many._forward_many_triton, xs, joined, thresholds)
    for masked, learned in ((True, True), (False, True), (True, False)):
        gradient = f"{variant}, {'masked' if masked else 'straight-through'}{'' if learned else ', frozen'}"
        slopes = (alpha, joined) if learned else (None, None)
        yield gradient, partial(soft_threshold._backward_triton, x, out, slopes[0], masked)
        yield gradient, partial(soft_threshold_many._backward_many_triton, xs, flat, slopes[1], thresholds, masked)


def singular_value_threshold_launches() -> Iterator[Launch]:
    # The 16-bit matrices are decomposed in float32.
    for dtype, size in product(("float32", "float64"), (16, 256)):
        u, s, vh = (torch.zeros(shape, dtype=DTYPES[dtype]) for shape in ((2, size, size), (2, size), (2, size, size)))
        yield f"{dtype}, {size} x {size}", partial(singular_value_threshold._recombine_triton, u, s, vh, DTYPES[dtype])


def radix_select_launches(all_variants: bool) -> Iterator[Launch]:
    prefix, cut = torch.zeros((), dtype=torch.int64), torch.zeros(())
    for aligned in (True, False) if all_variants else (True,):
        values, name = [_tensor((100,), torch.float32, aligned)] * 2, "aligned" if aligned else "misaligned"
        for shift in (24, 16, 8, 0) if all_variants else (24, 0):
            yield f"shift {shift}, {name}", partial(radix_select._histogram_triton, values, [1, 1], prefix, shift)
        yield name, partial(radix_select._least_triton, values, cut)


Size = tuple[str, int, int, str, str]  # cell, hidden size, rank, dtype, precision
# A size of every kind: resident and streamed, no powers of two, no multiple of 16, float32 in each precision.
REPRESENTATIVE: list[Size] = [
    ("gru", 512, 32, "bfloat16", "tf32"), ("gru", 100, 10, "float32", "tf32"), ("lstm", 200, 16, "bfloat16", "tf32"),
    ("fastgrnn", 256, 16, "float32", "ieee"), ("mgu", 1000, 64, "bfloat16", "tf32"),
]  # fmt: skip


def every_size() -> list[Size]:
    """Return the sizes of the table: powers of two and others, and float32 in each precision."""
    kinds = ((100, "float32"), (256, "float32"), (100, "bfloat16"), (512, "bfloat16"), (1024, "bfloat16"))
    sizes = [(cell, hidden, hidden // 16, dtype, "tf32") for cell, (hidden, dtype) in product(CELLS, kinds)]
    others = [(200, 20, "bfloat16", "tf32"), (256, 16, "float64", "ieee")]
    others += [(256, 16, "float32", precision) for precision in ("ieee", "tf32x3")]
    return [*sizes, *(("gru", *other) for other in others)]


def low_rank_launches(sizes: Iterable[Size]) -> Iterator[Launch]:
    for size in sizes:
        yield from _low_rank_launches(*size)


def _low_rank_launches(cell: str, hidden: int, rank: int, dtype: str, precision: str) -> list[Launch]:
    of, steps, batch = CELLS[cell], 2, 2

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=DTYPES[dtype])

    outputs, states = zeros(steps, batch, hidden), [zeros(batch, hidden) for _ in of.states]
    gates_x, p = zeros(steps, batch, of.gates * hidden), zeros(steps, batch, rank)
    saved = zeros(*saved_shape(of, steps, batch, hidden))
    scale = torch.zeros(of.scalars, dtype=torch.promote_types(DTYPES[dtype], torch.float32))
    weights = zeros(of.gates * hidden, rank), zeros(hidden, rank), zeros(of.bias_blocks * hidden), scale, states
    forward = (cell, gates_x, *weights, None, False, True, precision)
    backward = (cell, outputs, states, None, outputs, p, saved, *weights, None, False, precision)
    variant = f"{cell}, {hidden} x {rank}, {dtype}" + (f", {precision}" if dtype == "float32" else "")
    return [(variant, partial(low_rank_gpu.forward, *forward)), (variant, partial(low_rank_gpu.backward, *backward))]


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    numel = torch.Size(shape).numel()
    return torch.zeros(numel + 1, dtype=dtype)[0 if aligned else 1 :][:numel].view(shape)


# ---- compilation without a GPU ------------------------------------------------------------------------------------


class _Driver:
    """As much of a GPU driver as it takes to compile for a GPU that is not there."""

    def __init__(self, target: str):
        self.target = target

    def get_current_device(self) -> str:
        return self.target  # Only a key of the kernels' caches.

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]


@contextmanager
def compiling_for(target: str) -> Iterator[list[CompiledKernel]]:
    """Make launches inside the context only compile, and add what they compiled to the list."""
    compiled: list[CompiledKernel] = []
    launch = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, **options: Any) -> None:
        compiled.append(launch(kernel, *args, **options | {"warmup": True}))

    no_gpu = SimpleNamespace(active=_Driver(target))
    with (
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


def resources(target: str, variant: str, kernel: CompiledKernel) -> Resources:
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
        longest_loop(kernel),
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


def measure(target: str, all_variants: bool) -> list[Resources]:
    return [resources(target, *build) for build in builds(target, launches(all_variants))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--all", action="store_true", help="every variant, not only those that differ most (an hour)")
    args = parser.parse_args()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = [row for part in pool.map(partial(measure, all_variants=args.all), TARGETS) for row in part]
    columns = ("registers", "spills", "shared", "load_bits", "store_bits", "loop", "exponentials", "barriers")
    print(f"{'kernel':42} {'target':7}" + "".join(f"{column:>13}" for column in columns) + "  variant")
    for row in sorted(rows, key=lambda row: (row.kernel, row.target, row.variant)):
        print(
            f"{row.kernel:42} {row.target:7}" + "".join(f"{getattr(row, c):13}" for c in columns) + f"  {row.variant}"
        )
    if args.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        args.json.write_text(
            json.dumps({"versions": versions, "kernels": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
