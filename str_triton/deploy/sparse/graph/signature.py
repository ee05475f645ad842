"""The arguments that a network takes: their structure, their dtypes, and the sizes that the export allows."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from str_triton.deploy.sparse.graph.guards import compile_guard

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.device)  # their text says what they are
_USUAL = (1, 2, 3, 7, 64, 225)
Size = int | str  # a string names a size that is the same wherever it stands


class Unfit(ValueError):
    """Arguments that a network was not exported for; the message names them."""


@dataclass(frozen=True)
class Leaf:
    """One argument: a tensor of this dtype and these sizes (None: any), or (dtype None) a constant."""

    dtype: torch.dtype | None
    sizes: tuple[Size, ...] | None = ()
    value: Any = None


@dataclass
class Signature:
    """The arguments that a network takes.

    Attributes:
        structure: of (args, kwargs).
        leaves: what stands in it.
        guards: conditions on named sizes, as Python expressions of integers.
        returns: the structure of the result.
        names: the names of the positional arguments.
        contiguous: take no tensors with other strides than contiguous ones.
        detached: take no tensors that require gradients.
    """

    structure: pytree.TreeSpec
    leaves: list[Leaf]
    guards: list[str]
    returns: pytree.TreeSpec
    names: list[str] = field(default_factory=list)
    contiguous: bool = False
    detached: bool = False

    def __post_init__(self) -> None:
        self.is_plain = self.structure == pytree.tree_flatten(((0,), {}))[1] and self.leaves[0].dtype is not None
        self._checks = [compile_guard(guard) for guard in self.guards]

    def __getstate__(self) -> dict[str, Any]:
        """Keep trees in place of their structures, which are not made for pickling."""
        trees = {name: pytree.tree_unflatten([0] * spec.num_leaves, spec) for name, spec in self._structures().items()}
        return {name: value for name, value in vars(self).items() if name != "_checks"} | trees

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update({name: pytree.tree_flatten(tree)[1] for name, tree in self._structures().items()})
        self._checks = [compile_guard(guard) for guard in self.guards]

    def _structures(self) -> dict[str, Any]:
        return {"structure": self.structure, "returns": self.returns}

    def flatten(self, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        """Return the leaves of a call's arguments.

        Raises Unfit if their structure is another one.
        """
        if self.is_plain and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return [args[0]]
        leaves, structure = pytree.tree_flatten(self._ordered(args, kwargs))
        if structure != self.structure:
            if self.is_plain:
                given = (
                    type(args[0]).__name__ if len(args) == 1 and not kwargs else f"{len(args) + len(kwargs)} arguments"
                )
                raise TypeError(f"a compiled network takes one tensor, got {given}")
            raise Unfit(f"the network was compiled for arguments {_shown(self.structure)}, got {_shown(structure)}")
        return leaves

    def tensors(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors among a call's arguments.

        Raises Unfit where the network does not take the arguments.
        """
        leaves = self.flatten(args, kwargs)
        self.check(leaves)
        return self.only_tensors(leaves)

    def only_tensors(self, leaves: Sequence[Any]) -> list[Tensor]:
        """Return the leaves that the network reads, without its constant arguments."""
        return [given for given, leaf in zip(leaves, self.leaves, strict=True) if leaf.dtype is not None]

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Check whether the network takes these arguments."""
        try:
            self.check(leaves)
        except Unfit:
            return False
        return True

    def named(self) -> dict[str, None]:
        """Return the names of the open sizes in order."""
        return {size: None for leaf in self.leaves for size in leaf.sizes or () if isinstance(size, str)}

    def values(self, leaves: Sequence[Any]) -> dict[str, int]:
        """Return the open sizes of such arguments by their names."""
        tensors = ((leaf.sizes, given.shape) for leaf, given in zip(self.leaves, leaves, strict=True) if leaf.sizes)
        return {size: n for sizes, shape in tensors for size, n in zip(sizes, shape, strict=True) if type(size) is str}

    def holds_for_usual_sizes(self) -> bool:
        """Check that the guards exclude no more than empty tensors do."""
        return all(check(dict.fromkeys(self.named(), n)) for check in self._checks for n in _USUAL)

    def with_zero(self, name: str) -> "Signature":
        """Return a signature in which a size of zero meets the guards that exclude it whatever the other sizes are."""
        rest = self.named().keys() - {name}
        guards = [
            guard if any(check(dict.fromkeys(rest, n) | {name: 0}) for n in _USUAL) else f"{name} == 0 or ({guard})"
            for guard, check in zip(self.guards, self._checks, strict=True)
        ]
        return replace(self, guards=guards)

    def _ordered(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Put arguments that were given by name where the example had them."""
        kwargs = dict(kwargs)
        for name in self.names[len(args) :]:
            if name not in kwargs:
                break
            args = (*args, kwargs.pop(name))
        (_, named) = self.structure.children()
        order = [key for key in named.context if key in kwargs]
        return args, {key: kwargs[key] for key in (*order, *(key for key in kwargs if key not in order))}

    def check(self, leaves: Sequence[Any]) -> None:
        """Raise Unfit where the network does not take these arguments."""
        self.check_constants(leaves)
        sizes: dict[str, int] = {}
        for number, (leaf, given) in enumerate(zip(self.leaves, leaves, strict=True)):
            if leaf.dtype is None:
                continue
            check_tensor(given, leaf.dtype)
            if self.contiguous and not given.is_contiguous():
                strides = f"strides {list(given.stride())} of {self._place(number)}"
                raise Unfit(f"the network was compiled for contiguous tensors, got {strides}")
            if self.detached and given.requires_grad:
                raise Unfit(f"the network was compiled without gradients, and {self._place(number)} requires them")
            if leaf.sizes is None:
                continue
            shape, known = tuple(given.shape), dict(sizes)
            wanted = tuple(
                size if isinstance(size, int) else sizes.setdefault(size, n)
                for size, n in zip(leaf.sizes, shape, strict=False)
            )
            if shape != wanted or len(shape) != len(leaf.sizes):
                expected = f"{self._place(number)} of shape [{_sizes(leaf.sizes, known)}]"
                raise Unfit(f"the network was compiled for {expected}, got {list(shape)}")
        for guard, check in zip(self.guards, self._checks, strict=True):
            if not check(sizes):
                names = re.findall(r"[A-Za-z_]\w*", guard)
                stated = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name in names)
                meant = ", ".join(f"{name} is {self.place(name)}" for name in sizes if name in names)
                raise Unfit(f"the network was compiled for sizes with {guard}, got {stated}; {meant}")

    def place(self, name: str) -> str:
        """Return the first place of a size: the tensor and its dimension."""
        places = ((number, leaf.sizes) for number, leaf in enumerate(self.leaves) if name in (leaf.sizes or ()))
        number, sizes = next(places)
        return f"dimension {sizes.index(name)} of {self._place(number)}"

    def check_constants(self, leaves: Sequence[Any]) -> None:
        """Raise Unfit where an argument that is no tensor has another value or type than the example's."""
        for number, (leaf, given) in enumerate(zip(self.leaves, leaves, strict=True)):
            if leaf.dtype is None and not _is_same(given, leaf.value):
                got = f"a {type(given).__name__}" if isinstance(given, Tensor) else " ".join(repr(given).split())[:80]
                raise Unfit(f"the network was compiled for {leaf.value!r} as {self._place(number)}, got {got}")

    def _place(self, number: int) -> str:
        return f"argument {number + 1}" if len(self.leaves) > 1 else "the input"


class _Any:
    def __repr__(self) -> str:
        return "_"


def _shown(structure: pytree.TreeSpec) -> str:
    """Return the structure of a call's arguments in a line, with `_` in the place of every leaf."""
    args, kwargs = pytree.tree_unflatten([_Any()] * structure.num_leaves, structure)
    named = [f"{name}={value!r}" for name, value in kwargs.items()]
    return " ".join(f"({', '.join([*map(repr, args), *named])})".split())


def _is_same(given: Any, value: Any) -> bool:
    """Check that two constants have one effect. `==` does not: 2, 2.0 and True are equal, and so are 0.0 and -0.0."""
    if given is value:
        return True
    return type(given) is type(value) and type(given) in _CONSTANTS and repr(given) == repr(value)


def _sizes(sizes: tuple[Size, ...], known: dict[str, int]) -> str:
    """Describe sizes: a named one by its value in an earlier argument, by "any", or by its name if it is repeated."""

    def described(size: Size) -> str:
        free = isinstance(size, str) and sizes.count(size) == 1
        return str(known.get(str(size), "any" if free else size))

    return ", ".join(map(described, sizes))


def check_tensor(given: Any, dtype: torch.dtype) -> None:
    """Raise where an argument cannot be used as a plain tensor of this dtype."""
    if not isinstance(given, Tensor):
        raise TypeError(f"a compiled network takes a tensor here, got {type(given).__name__}")
    is_strided = given.layout is torch.strided and not given.is_nested
    if given.dtype != dtype or given.device.type != "cpu" or not is_strided:
        kind = "float32" if dtype == torch.float32 else str(dtype)
        layout = "" if is_strided else f" in the layout {'nested' if given.is_nested else given.layout}"
        raise ValueError(f"a compiled network takes {kind} on the CPU, got {given.dtype} on {given.device}{layout}")


def parameter_names(forward: Callable, count: int) -> list[str]:
    """Return the names of the first `count` arguments of a function, as far as they can be given by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    names = []
    for parameter in parameters:
        if parameter.kind not in kinds or len(names) == count:
            break
        names.append(parameter.name)
    return names
