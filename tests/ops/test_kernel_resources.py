"""Oracle 4: every kernel, compiled ahead of time without a GPU, builds, fits, and moves memory as it should."""

import importlib
import pkgutil
import re
from functools import cached_property

import pytest

pytest.importorskip("triton", reason="triton is for Linux")

import torch
import triton
from triton.runtime.jit import JITFunction

import str_triton.kernels
from benchmarks.speed.kernel_launches import (
    DTYPES,
    REPRESENTATIVE,
    low_rank_launches,
    low_rank_pair,
    op_launches,
)
from benchmarks.speed.kernel_resources import (
    CHIPS,
    SHARED_MEMORY,
    TARGETS,
    Resources,
    access_bits,
    builds,
    compiling_for,
    longest_loop,
    resources,
)
from str_triton.kernels import low_rank_cells
from str_triton.ops import soft_threshold_many
from str_triton.ops.low_rank_cell import CELLS
from str_triton.ops.low_rank_plan import Plan, layout, resident_bytes

# The largest resident time loop may spill on NVIDIA (bytes), every loop a little on AMD (registers). The streamed loop
# of an MGU of 1000 x 64, compiled here for gfx942 alone, spills 55 registers forward and 179 backward on gfx1100.
LARGEST_LOOP, PAPERS_LOOP = "gru, 512 x 32, bfloat16", "gru, 100 x 10, float32, tf32"
LOOPS_MAY_SPILL = {"nvidia": 144, "cdna": 32, "rdna": 80}
ACTIVATIONS = {"gru": 3, "lstm": 5, "fastgrnn": 2, "mgu": 2}  # of a hidden unit at a step
LOOPS = {"low_rank_rnn_forward_kernel", "low_rank_rnn_backward_kernel"}
STREAMING = {
    "soft_threshold_kernel",
    "soft_threshold_backward_kernel",
    "soft_threshold_many_kernel",
    "soft_threshold_many_backward_kernel",
}


class Build:
    def __init__(self, target: str, variant: str, kernel):
        self.target, self.variant, self.kernel, self.name = target, variant, kernel, kernel.metadata.name

        self.backward = "backward" in self.name

    @cached_property
    def resources(self) -> Resources:
        return resources(self.target, self.variant, self.kernel, loop=False)

    @cached_property
    def plan(self) -> Plan:
        """The plan of a time loop."""
        cell, size, dtype, *_ = self.variant.split(", ")
        limit, chip = SHARED_MEMORY[self.target], CHIPS.get(self.target, "nvidia")
        return layout(CELLS[cell], *map(int, size.split(" x ")), DTYPES[dtype], limit, self.backward, chip)

    def __repr__(self) -> str:
        return f"{self.name} for {self.target} ({self.variant})"


# The recurrent kernels for every target, the others for one of each kind.
@pytest.fixture(scope="module", params=["sm_86", "sm_90", "gfx942"])
def built(request: pytest.FixtureRequest) -> list[Build]:
    return [Build(request.param, *build) for build in builds(request.param, op_launches(all_variants=False))]


@pytest.fixture(scope="module", params=TARGETS)
def loops(request: pytest.FixtureRequest) -> list[Build]:
    sizes = REPRESENTATIVE if request.param in ("sm_90", "gfx942") else REPRESENTATIVE[:3]
    return [Build(request.param, *build) for build in builds(request.param, low_rank_launches(sizes))]


def every_kernel() -> dict[str, JITFunction]:
    modules = pkgutil.iter_modules(str_triton.kernels.__path__, "str_triton.kernels.")
    values = [item for module in modules for item in vars(importlib.import_module(module.name)).items()]
    return {name: value for name, value in values if isinstance(value, JITFunction) and name.endswith("_kernel")}


def test_every_kernel_is_compiled(built):
    kernels = set(every_kernel())
    assert len(kernels) >= 10
    assert {build.name for build in built} | LOOPS == kernels


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("hidden", "rank"), [(100, 10), (1000, 64)], ids=["resident", "streamed"])
def test_every_variant_of_time_loops_is_translated(cell, hidden, rank):
    """By Triton's frontend alone, which refuses code that the interpreter runs; what follows is compiled below."""
    for lengths, reverse in ((None, False), (torch.tensor([1, 2]), True)):
        with compiling_for("sm_90", translate_only=True) as codes:
            for _, launch in low_rank_pair(cell, hidden, rank, "bfloat16", "tf32", lengths, reverse):
                launch()
        assert all(name in code for name, code in zip(sorted(LOOPS, reverse=True), codes, strict=True))


def test_every_cell_is_compiled():
    assert {size[0] for size in REPRESENTATIVE} == ACTIVATIONS.keys() == CELLS.keys()


def test_shared_memory_and_spills(built):
    for build in built:
        found = build.resources
        assert 0 < found.registers <= 512
        assert found.shared <= SHARED_MEMORY[build.target], build
        assert found.spills == 0, build


def test_shared_memory_and_spills_of_time_loops(loops):
    """The plan must know the memory before the kernel is compiled."""
    kinds = set()
    for build in loops:
        found, plan, chip = build.resources, build.plan, CHIPS.get(build.target, "nvidia")
        cell, _, dtype, *_ = build.variant.split(", ")
        kinds.add(plan.kind)
        assert 0 < found.registers <= 512
        assert found.shared <= SHARED_MEMORY[build.target], build
        may_spill = build.variant == LARGEST_LOOP or (chip != "nvidia" and build.variant != PAPERS_LOOP)
        assert found.spills <= (LOOPS_MAY_SPILL[chip] if may_spill else 0), build
        if plan.kind == "resident":
            blocks = plan.block_hidden, plan.block_rank, plan.block_batch, DTYPES[dtype].itemsize, plan.warps
            assert found.shared <= resident_bytes(CELLS[cell], *blocks), build
    assert kinds == {"resident", "streamed"} or loops[0].target not in ("sm_86", "sm_90", "gfx942")


def test_instructions_of_time_loops(loops):
    """Each activation once, in one instruction, and every product on the matrix units of its precision."""
    for build in loops:
        found, code, chip = build.resources, build.kernel.asm, CHIPS.get(build.target, "nvidia")
        cell, _, dtype, *precision = build.variant.split(", ")
        assert not build.backward or found.exponentials <= (8 if cell == "lstm" else 0), build
        kinds = {"bfloat16": "bf16.bf16", "float32": "tf32.tf32"} if chip == "nvidia" else {"bfloat16": "bf16"}
        if precision == ["ieee"] or (chip == "rdna" and dtype == "float32"):
            assert not found.dots or chip == "cdna", build
        elif chip == "cdna" and dtype == "float32":
            assert found.dots == "v_mfma_f32_16x16x4_f32", build
        else:
            assert kinds[dtype] in found.dots, build
        if chip == "nvidia":
            assert found.barriers <= 52, build
            assert code["ptx"].count("ex2.approx.ftz.f32") == found.exponentials, build
            assert code["ptx"].count("rcp.approx.ftz.f32") == found.exponentials, build
            assert "div." not in code["ptx"], build
            if not build.backward:
                # Those of a tile, shared out among threads.
                tile = build.plan.block_hidden * build.plan.block_batch // (32 * build.plan.warps)
                assert found.exponentials == ACTIVATIONS[cell] * tile, build


def test_what_a_step_of_a_resident_loop_loads(loops):
    """The gates or gradients of a step alone, no factor and no bias; with `ahead` those of the next step, and first."""
    for build in (build for build in loops if build.plan.kind == "resident"):
        cell = CELLS[build.variant.split(", ")[0]]
        (step,) = re.findall(r"\n    %[^\n]* = scf\.for %step .*?\n    \}", build.kernel.asm["ttir"], re.DOTALL)
        loaded = re.findall(r"(%\w+) = tt\.load", step)
        # Backward: the gradient of the output and what is saved; if the cell reads the state before, that and h0, whose
        # sum is handed on; of a cell with c also the gradient of the last h, which is loaded where it is added.
        alone = 1 + cell.saved if build.backward else cell.gates
        reads_before = len(re.findall(r"\bbefore\b", getattr(low_rank_cells, f"{cell.name}_backward").src)) > 1
        assert len(loaded) == alone + (2 * reads_before + (len(cell.states) > 1) if build.backward else 0), build
        moved = dict(re.findall(r"(%\w+) = tt\.(?:reshape|trans) (%\w+)", step))  # of a tile that is stored whole
        handed_on = re.findall(r"%\w+", re.search(r"scf\.yield (.*?) :", step)[1])
        for _ in moved:
            handed_on = [moved.get(name, name) for name in handed_on]
        ahead = not build.backward or build.plan.ahead
        assert len({*loaded} & {*handed_on}) == (alone if ahead else 0), build
        before = step[: step.index("tt.dot", step.index("tt.load"))]
        assert len(re.findall("tt.load", before)) >= alone, build


@pytest.mark.parametrize(
    ("target", "dtype", "approximate"),
    [("sm_90", "float32", True), ("sm_90", "float64", False), ("gfx942", "float32", False)],
)
def test_approximate_instructions_are_nvidias_and_not_for_float64(target, dtype, approximate):
    _, launch = low_rank_pair("fastgrnn", 20, 3, dtype, "tf32x3")[0]
    with compiling_for(target, translate_only=True) as codes:
        launch()
    for found in ("ex2.approx", "rcp.approx", "inputPrecision = tf32x3"):
        assert (found in codes[0]) == approximate


def test_a_translation_does_not_take_the_compiler_of_another_target():
    """A kernel keeps the compiler of the target that was new to it last, for all targets."""
    found = []
    for dtype in ("float32", "float64"):
        _, launch = low_rank_pair("mgu", 20, 3, dtype, "tf32x3")[0]
        with compiling_for("sm_90", translate_only=True) as codes:
            launch()
        found += codes
        for kernel in every_kernel().values():
            kernel.compile = triton.compiler.compile
    assert all(isinstance(code, str) for code in found)


def test_launches_of_a_list():
    """If only the addresses of gradients are new, one launch writes them; a frozen threshold is not reduced."""
    for tables in (soft_threshold_many._written, soft_threshold_many._layout_tables):
        tables.cache_clear()
    thresholds, flat, slope = [1, 1], torch.zeros(256), torch.zeros(2)
    steps = [[torch.zeros(2, 64) for _ in thresholds] for _ in range(3)]  # all alive: no address returns
    table, backward, reduce = (f"soft_threshold_many_{name}_kernel" for name in ("table", "backward", "reduce"))
    expected = [
        (slope, [table, table, backward, reduce]),
        (slope, [table, backward, reduce]),
        (None, [table, backward]),
    ]
    for grads, (given, names) in zip(steps, expected, strict=True):
        with compiling_for("sm_90", translate_only=True) as codes:
            soft_threshold_many._backward_many_triton(grads, flat, given, thresholds, True)
        assert [re.search(r"tt\.func public @(\w+)", code)[1] for code in codes] == names


def test_no_atomics_on_global_memory(built):
    """Histograms may count in shared memory, in integers."""
    patterns = {"ptx": r"\b(?:atom|red)\.(?:\w+\.)*global[\w.]*", "amdgcn": r"(?:global|buffer|flat)_atomic\w+"}
    for build in built:
        code = build.kernel.asm
        (pattern,) = (patterns[kind] for kind in patterns if kind in code)
        assert not re.findall(pattern, code["ptx" if "ptx" in code else "amdgcn"]), build


def test_instructions_of_a_step(loops):
    """Per thread: 1408 forward and 1092 backward before the approximate activations and programs of 8 sequences.

    Saved as whole tiles, which need no detour through shared memory, the gates cost 8 barriers less in each.
    """
    if loops[0].target == "sm_90":
        steps = {build.backward: longest_loop(build.kernel) for build in loops if build.variant == LARGEST_LOOP}
        assert steps[False] <= 470
        assert steps[True] <= 525
        barriers = {build.backward: build.resources.barriers for build in loops if build.variant == LARGEST_LOOP}
        assert barriers[False] <= 29
        assert barriers[True] <= 34


def test_memory_is_moved_in_vectors(built):
    """16 bytes at once where addresses and rows allow; a thread on AMD has four elements: 8 bytes of a 16-bit type."""
    streaming = [build for build in built if build.name in STREAMING]
    assert {build.name for build in streaming} == STREAMING
    for build in streaming:
        itemsize = 2 if "bfloat16" in build.variant else 4
        threads = build.kernel.metadata.num_warps * TARGETS[build.target].warp_size
        bits_per_thread = 1024 // threads * itemsize * 8
        bits = min(128, bits_per_thread)
        per_tensor = bits_per_thread // bits
        per_weight = "per weight" in build.variant
        learned = "frozen" not in build.variant
        loaded = ("backward" in build.name) + 1 + (per_weight and learned)
        stored = "straight-through" not in build.variant
        if "backward" in build.name:
            stored += per_weight and learned
        if "misaligned" not in build.variant:
            assert access_bits(build.kernel, "load").count(bits) == loaded * per_tensor, build
        # Whatever comes in, our own buffers are aligned.
        assert access_bits(build.kernel, "store").count(bits) == stored * per_tensor, build


def order_of_summation(build: Build) -> tuple[str, ...]:
    """The layouts of what the kernel's reductions take: they settle the order in which elements are added."""
    code = build.kernel.asm["ttgir"]
    assert "allow_reorder" not in code  # As tl.sum without an axis does: then the layout before it would count too.
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", code, re.MULTILINE))
    operands = re.findall(r'"tt\.reduce"\(.*?\}\).*?: \(tensor<[^,>]*, (#\w+)>\)', code, re.DOTALL)
    return tuple(layouts[operand] for operand in operands)


@pytest.mark.parametrize(
    ("kernels", "reductions"),
    [
        ({"soft_threshold_backward_kernel", "soft_threshold_many_backward_kernel"}, 2),  # Rows of 16, and other rows.
        ({"soft_threshold_reduce_kernel", "soft_threshold_many_reduce_kernel"}, 1),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_list_sums_in_the_order_of_a_loop(built, dtype, kernels, reductions):
    """Whatever the alignment of the gradient: the interpreter cannot see this."""
    orders = {
        (build.name, build.variant): order_of_summation(build)
        for build in built
        if build.name in kernels and build.variant.startswith(dtype) and "per row" in build.variant
        if "frozen" not in build.variant
    }
    assert {name for name, _ in orders} == kernels or dtype == "bfloat16"
    assert len(set(orders.values())) <= 1, orders
    assert all(len(order) == reductions for order in orders.values())


def test_offsets_are_64_bits_wide(built):
    """And the products that they are made of: in the code as written, before the compiler narrows what it may."""
    for build in (build for build in built if build.name in STREAMING or build.name.endswith("reduce_kernel")):
        code = build.kernel.asm["ttir"]
        offsets = re.findall(r"tt\.addptr .* tensor<[\dx]+xi(\d+)>", code)
        products = re.findall(r"arith\.muli .* : (?:tensor<[\dx]+x)?i(\d+)", code)
        assert offsets, build
        assert products, build
        assert {*offsets, *products} == {"64"}, build
