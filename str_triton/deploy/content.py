"""The header of a packed file: its fields, and the checks of their consistency.

docs/packed-format.md describes the format. A file may come from anybody, so nothing in it is trusted before `check` has
passed. After that, it can be read without a traceback and in an amount of memory in proportion to its size.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from str_triton.budget.budget import Budget
from str_triton.budget.rank_budget import RankBudget
from str_triton.deploy.typed_json import LARGEST, typed

# safetensors' names of the dtypes that can be stored.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The dtypes that weights are rounded to; None: no rounding.
VALUES = {"float32": None, "float16": "F16", "bfloat16": "BF16"}
BUDGETS = {"Budget": Budget, "RankBudget": RankBudget}
FACTORS = ("F64", "F32", "F16", "BF16")  # the dtypes of factors, which torch must be able to multiply
# Texts, which `typed` compares with these when it reads a file.
if TYPE_CHECKING:
    DtypeName = str
    ValuesName = str
else:
    DtypeName, ValuesName = Literal[*DTYPES], Literal[*VALUES]
# The largest size of all tensors together in bytes: a constant, plus a multiple of the file's size. Zeros take no bytes
# in a file, so without a limit a small file could fill any memory.
FREE_NBYTES, NBYTES_PER_BYTE = 2**30, 1000


@dataclass(frozen=True)
class Array:
    """An entry of the safetensors header."""

    dtype: DtypeName
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Shared:
    """A tensor that shares the memory of an earlier one."""

    same_as: str


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A stored tensor: its dtype and shape, and the checksum of its arrays. low_bits is None for a dense one."""

    dtype: DtypeName
    shape: tuple[int, ...]
    nonzeros: int
    low_bits: int | None = None
    sha256: str


@dataclass(frozen=True)
class Content:
    """The content of a packed file's header, as docs/packed-format.md lists it."""

    values: ValuesName
    budget: dict[str, Any] | None
    metadata: dict[str, Any]
    products: dict[str, tuple[str, str]]
    tensors: dict[str, Shared | Stored]

    def source(self, name: str) -> str:
        """Return the name under which a tensor is stored."""
        entry = self.tensors[name]
        return entry.same_as if isinstance(entry, Shared) else name

    def stored(self, name: str) -> Stored:
        """Return the entry of a tensor, or of the tensor whose memory it shares."""
        entry = self.tensors[self.source(name)]
        if isinstance(entry, Shared):
            raise ValueError(f"tensor {name!r} shares the memory of one that shares another's")
        return entry


def record(content: Content) -> dict[str, Any]:
    """Return the content as values for JSON. `typed(Content, ...)` is the inverse."""
    tensors = {
        name: {key: value for key, value in vars(entry).items() if value is not None}
        for name, entry in content.tensors.items()
    }
    return {**vars(content), "tensors": tensors}


def budget_record(budget: Budget | RankBudget | None) -> dict[str, Any] | None:
    """Return a budget as values for JSON."""
    if budget is None:
        return None
    if type(budget).__name__ not in BUDGETS:
        raise TypeError(f"budget must be a Budget or a RankBudget, got {type(budget).__name__}")
    return {"kind": type(budget).__name__, **dataclasses.asdict(budget)}


def budget_of(content: Content) -> Budget | RankBudget | None:
    """Return the budget in a content. Raise ValueError if it is not valid."""
    if content.budget is None:
        return None
    kind = typed(Literal[*BUDGETS], content.budget.get("kind"), "budget.kind")
    rest = {key: value for key, value in content.budget.items() if key != "kind"}
    budget = typed(BUDGETS[kind], rest, "budget")
    for i, row in enumerate(budget.rows):
        pairs = (("nonzeros", "params"), ("flops", "dense_flops")) if kind == "Budget" else (("rank", "max_rank"),)
        for part, whole in pairs:
            if getattr(row, part) > getattr(row, whole):
                raise ValueError(f"budget.rows[{i}]: {part} is {getattr(row, part)}, {whole} {getattr(row, whole)}")
    return budget


def part_names(name: str) -> tuple[str, str, str]:
    """Return the names of the arrays with the values, positions and signs of a sparse tensor."""
    return f"{name}|values", f"{name}|positions", f"{name}|signs"


def own_arrays(name: str, stored: Mapping[str, Any]) -> list[str]:
    """Return the names of a tensor's arrays, in the order of its checksum: one if it is dense, else two or three."""
    return [key for key in (name, *part_names(name)) if key in stored]


def check(content: Content, arrays: Mapping[str, Array], nbytes: int) -> None:
    """Check that a header is consistent. Raise ValueError, which names the tensor or array, if it is not.

    ``nbytes`` is the size of the file.
    """
    end = 0
    for name, array in sorted(arrays.items(), key=lambda item: item[1].data_offsets):
        begin, own_end = array.data_offsets
        size = elements(name, array.shape) * DTYPES[array.dtype].itemsize
        if begin != end or own_end != begin + size:
            raise ValueError(f"array {name!r}: bytes {begin} to {own_end}, but it must take {size} from {end} on")
        end = own_end
    seen: dict[str, Stored] = {}
    owned: set[str] = set()
    for name, entry in content.tensors.items():
        if isinstance(entry, Stored):
            seen[name] = entry
            own = set(own_arrays(name, arrays))
            if own & owned:
                raise ValueError(f"array {min(own & owned)!r} belongs to two tensors")
            owned |= own
            _check_stored(name, entry, arrays, content.values)
        elif entry.same_as not in seen:
            raise ValueError(f"tensor {name!r} is the same as {entry.same_as!r}, which is not stored before it")
    if left := arrays.keys() - owned:
        raise ValueError(f"array {min(left)!r} belongs to no tensor")
    total = sum(_nbytes(entry) for entry in seen.values()) + _check_products(content)
    if total > FREE_NBYTES + NBYTES_PER_BYTE * nbytes:
        raise ValueError(f"its tensors would take {total:,} bytes, too many for a file of {nbytes:,}")
    budget_of(content)


def elements(name: str, shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape. Raise ValueError if their size overflows 64 bits."""
    count = 1
    for size in shape:
        count *= max(size, 1)
        if 8 * count > LARGEST:
            raise ValueError(f"{name!r}: the shape {list(shape[:8])} has more elements than can be counted")
    return 0 if 0 in shape else count


def _check_stored(name: str, entry: Stored, arrays: Mapping[str, Array], values: str) -> None:
    own = own_arrays(name, arrays)
    count = elements(name, entry.shape)
    is_dense, is_sparse = own == [name], own in (list(part_names(name)[:2]), list(part_names(name)))
    if not (is_sparse if entry.low_bits is not None else is_dense):
        kind = "dense" if entry.low_bits is None else "sparse"
        raise ValueError(f"tensor {name!r}: it is {kind}, but its arrays are {own}")
    first = arrays[own[0]]
    own_dtype, stored = DTYPES[entry.dtype], DTYPES[first.dtype]
    is_rounded = first.dtype == VALUES[values] and own_dtype.is_floating_point and stored.itemsize < own_dtype.itemsize
    if first.dtype != entry.dtype and not is_rounded:
        raise ValueError(f"tensor {name!r} is {entry.dtype}, its values are {first.dtype}, rounded to {values}")
    if entry.low_bits is None:
        if first.shape != entry.shape:
            raise ValueError(f"tensor {name!r}: its shape is {list(entry.shape)}, its array's {list(first.shape)}")
        stored_count = count
    else:
        for key in own:
            if len(arrays[key].shape) != 1 or (key != own[0] and arrays[key].dtype != "U8"):
                raise ValueError(f"array {key!r} must be {'a list' if key == own[0] else 'a list of U8'}")
        stored_count = first.shape[0]
        _check_sparse(name, entry.low_bits, count, *(arrays[key].shape[0] for key in own))
        if len(own) == 3 and not own_dtype.is_floating_point:
            raise ValueError(f"tensor {name!r} is {entry.dtype}, whose zeros have no signs")
    if entry.nonzeros > stored_count:
        raise ValueError(f"tensor {name!r}: {entry.nonzeros} of {stored_count} elements are not zero")


def _check_sparse(name: str, low_bits: int, count: int, values: int, positions: int, signs: int | None = None) -> None:
    """Check that the lengths of a sparse tensor's arrays agree. ``count`` is the number of the tensor's elements."""
    if values > count:
        raise ValueError(f"tensor {name!r}: {values} values for {count} elements")
    if low_bits >= max(1, count.bit_length()):
        raise ValueError(f"tensor {name!r}: low_bits is {low_bits}, too many for {count} elements")
    if positions < -(-values * low_bits // 8):
        raise ValueError(f"tensor {name!r}: {positions} bytes do not hold the positions of {values} values")
    if signs not in (None, -(-(count - values) // 8)):
        raise ValueError(f"tensor {name!r}: {signs} bytes are not the signs of {count - values} zeros")


def _nbytes(entry: Stored) -> int:
    return elements("", entry.shape) * DTYPES[entry.dtype].itemsize


def _check_products(content: Content) -> int:
    """Check the matrices stored in factors, and return the bytes of their products."""
    uses = Counter(name for pair in content.products.values() for name in pair)
    nbytes: dict[tuple[str, str], int] = {}
    for matrix, pair in content.products.items():
        for name in pair:
            if name not in content.tensors or uses[name] > 1:
                raise ValueError(f"product {matrix!r}: its factor {name!r} is missing or used twice")
        if matrix in content.tensors:
            raise ValueError(f"product {matrix!r} is also a tensor")
        u, v = map(content.stored, pair)
        shapes = u.shape, v.shape
        if any(len(shape) != 2 for shape in shapes) or u.shape[1] != v.shape[1] or not u.shape[1]:
            raise ValueError(f"product {matrix!r}: factors of shapes {list(u.shape)} and {list(v.shape)}")
        if u.dtype != v.dtype or u.dtype not in FACTORS:
            raise ValueError(f"product {matrix!r}: factors of dtypes {u.dtype} and {v.dtype}")
        first, second = map(content.source, pair)
        nbytes[first, second] = elements(matrix, (u.shape[0], v.shape[0])) * DTYPES[u.dtype].itemsize
    return sum(nbytes.values())
