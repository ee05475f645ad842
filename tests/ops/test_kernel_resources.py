"""Oracle 4: every kernel, compiled ahead of time without a GPU, builds, fits, and moves memory as it should."""

import importlib
import pkgutil
import re

import pytest

pytest.importorskip("triton", reason="triton is for Linux")

from triton.runtime.jit import JITFunction

import str_triton.kernels
from benchmarks.kernel_resources import (
    DTYPES,
    SHARED_MEMORY,
    TARGETS,
    Resources,
    access_bits,
    builds,
    launches,
    resources,
)
from str_triton.ops.low_rank_triton import _resident_bytes, layout
from str_triton.ops.time_loop import CELLS

# Matrix products may spill, time loops a little; a kernel that looks at every element once has no reason to.
MAY_SPILL = {"singular_value_threshold_recombine_kernel": 4096} | {
    f"low_rank_{cell}_{direction}_kernel": 256 for cell in CELLS for direction in ("forward", "backward")
}
STREAMING = {
    "soft_threshold_kernel",
    "soft_threshold_backward_kernel",
    "soft_threshold_many_kernel",
    "soft_threshold_many_backward_kernel",
}


class Build:
    def __init__(self, target: str, variant: str, kernel):
        self.target, self.variant, self.kernel, self.name = target, variant, kernel, kernel.metadata.name

    @property
    def resources(self) -> Resources:
        return resources(self.target, self.variant, self.kernel)

    def __repr__(self) -> str:
        return f"{self.name} for {self.target} ({self.variant})"


@pytest.fixture(scope="module", params=TARGETS)
def built(request: pytest.FixtureRequest) -> list[Build]:
    return [Build(request.param, *build) for build in builds(request.param, launches(all_variants=False))]


def test_every_kernel_is_compiled(built):
    kernels = set()
    for module in pkgutil.iter_modules(str_triton.kernels.__path__, "str_triton.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                kernels.add(name)
    assert len(kernels) >= 7
    assert {build.name for build in built} == kernels


def test_shared_memory_and_spills(built):
    for build in built:
        found = build.resources
        assert 0 < found.registers <= 512
        assert found.shared <= SHARED_MEMORY[build.target], build
        assert found.spills <= MAY_SPILL.get(build.name, 0), build


def test_shared_memory_of_resident_time_loops(built):
    """The plan must know it before the kernel is compiled."""
    kinds = set()
    for build in (build for build in built if build.name.startswith("low_rank")):
        cell, size, dtype = build.variant.split(", ")
        hidden, rank = map(int, size.split(" x "))
        backward = "backward" in build.name
        plan = layout(cell, hidden, rank, DTYPES[dtype], SHARED_MEMORY[build.target], backward)
        kinds.add(plan.kind)
        if plan.kind == "resident":
            blocks = plan.block_hidden, plan.block_rank, DTYPES[dtype].itemsize, plan.warps, plan.stages
            assert build.resources.shared <= _resident_bytes(CELLS[cell], *blocks, backward), build
    assert kinds == {"resident", "streamed"}


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
