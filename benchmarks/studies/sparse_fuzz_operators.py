"""Every operation that a saved network may call, with odd arguments: none may end the process.

    python -m benchmarks.studies.sparse_fuzz_operators [--first 0] [--count 400] [--name sparse_fuzz_operators]

Arguments of the right types are drawn at random: tensors of equal and unequal shapes, with sizes of zero, other dtypes
and strides, numbers from ordinary to the largest. The calls run in a child process, which tells the parent the seed
before each call. A call that a signal ends is written to benchmarks/results/NAME.json; one that takes longer than
SECONDS is skipped and counted, because such sizes are refused when a file is loaded. It needs a system with `fork`.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from benchmarks.timing import write
from str_triton.deploy.sparse.graph.operators import ATEN, allowed, wrong_argument

SECONDS = 8
MEMORY = 12 << 30
INTEGERS = (0, 1, 2, 3, 4, 5, 7, 100, -1, -2, -3, 2**31, -(2**31), 2**62, -(2**62), 2**63 - 1, -(2**63))
FLOATS = (0.0, 1.0, -1.0, 0.5, 2.0, 1e300, 1e-300, float("nan"), float("inf"), -float("inf"))
WORDS = ("none", "mean", "sum", "ij", "reflect", "constant", "replicate", "linear", "tanh", "floor", "fro", "nuc",
         "left", "prod", "amax", "ii", "ij,jk->ik", "nonsense")  # fmt: skip
OPTIONS = {
    "ScalarType": (torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float16),
    "Layout": (torch.strided,),
    "Device": (torch.device("cpu"),),
    "MemoryFormat": (torch.contiguous_format, torch.channels_last, torch.preserve_format),
}
DTYPES = (torch.float32,) * 6 + (torch.float64, torch.int64, torch.int64, torch.int32, torch.bool, torch.complex64,
          torch.uint8, torch.float16, torch.bfloat16)  # fmt: skip


class Draw(random.Random):
    """Arguments of one call; half of the tensors share a shape, and half a dtype."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.shape: list[int] | None = None
        self.dtype: torch.dtype | None = None

    def tensor(self) -> Tensor:
        shape = [self.choice((0, 1, 2, 2, 3, 3, 4, 5, 17)) for _ in range(self.choice((0, 1, 2, 2, 3, 3, 4, 4, 4, 5)))]
        if self.shape is not None and self.random() < 0.6:
            shape = list(self.shape)
            if shape and self.random() < 0.3:
                shape[self.randrange(len(shape))] = self.randrange(4)
            shape = shape[self.choice((0, 0, 0, 0, 1)) :]
        dtype = self.dtype if self.dtype is not None and self.random() < 0.5 else self.choice(DTYPES)
        self.shape, self.dtype = self.shape or shape, dtype
        if dtype.is_floating_point or dtype.is_complex:
            x = (torch.randn(shape) * self.choice((1.0, 1.0, 1e30))).to(dtype)
        else:
            x = torch.randint(self.choice((0, -3)), self.choice((2, 4, 10, 2**30)), shape).to(dtype)
        if x.dim() > 1 and self.random() < 0.2:
            return x.transpose(0, -1)
        return x[..., ::2] if x.dim() and self.random() < 0.1 else x

    def value(self, kind: Any) -> Any:
        """Return a value of a type of a schema; an optional one may be None."""
        name = str(kind)
        if name.startswith("Optional["):
            return None if self.random() < 0.4 else self.value(kind.getElementType())
        if name.startswith("List["):
            return [self.value(kind.getElementType()) for _ in range(self.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 6)))]
        makers: dict[str, Callable[[], Any]] = {
            "Tensor": self.tensor,
            "float": lambda: self.choice(FLOATS),
            "bool": lambda: self.random() < 0.5,
            "str": lambda: self.choice(WORDS),
            "Generator": lambda: None,
            **dict.fromkeys(("int", "SymInt"), self._integer),
            **dict.fromkeys(("number", "Scalar"), lambda: self.choice((self.choice(FLOATS), self._integer(), True))),
            **{option: lambda option=option: self.choice(OPTIONS[option]) for option in OPTIONS},
        }
        return makers[name]()

    def _integer(self) -> int:
        return self.choice((0, 1, 1, 1, 2, 2, 3, -1)) if self.random() < 0.7 else self.choice(INTEGERS)

    def arguments(self, operation: OpOverload) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = [], {}
        for argument in operation._schema.arguments:
            usual = argument.has_default_value() and self.random() < 0.4
            value = argument.default_value if usual else self.value(argument.real_type)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return args, kwargs


def operations() -> Iterator[tuple[str, OpOverload]]:
    for packet in sorted(ATEN):
        found = getattr(torch.ops.aten, packet, None)
        for overload in found.overloads() if found is not None else ():
            if allowed(name := f"ops.aten.{packet}.{overload}"):
                yield name, getattr(found, overload)


def call(name: str, operation: OpOverload, number: int) -> bool:
    """Call an operation with the arguments of a number; return whether it took them."""
    draw = Draw(f"{name} {number}")
    torch.manual_seed(number)
    args, kwargs = draw.arguments(operation)
    if wrong_argument(operation, tuple(args), kwargs) is not None:
        return False
    signal.alarm(SECONDS)
    with contextlib.suppress(Exception):  # Refused, as it should be.
        operation(*args, **kwargs)
        signal.alarm(0)
        return True
    signal.alarm(0)
    return False


def run(name: str, operation: OpOverload, numbers: range) -> tuple[int, int | None, int]:
    """Make calls in a child process; return those that it took, the signal that ended it, and the last number."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        status = 1
        try:
            for number in numbers:
                os.write(writer, number.to_bytes(4, "little") + b"?")
                if call(name, operation, number):
                    os.write(writer, number.to_bytes(4, "little") + b"!")
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"no arguments could be drawn for {name}")
    lines = [told[i : i + 5] for i in range(0, len(told), 5)]
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return sum(line[4:] == b"!" for line in lines), ended, int.from_bytes(lines[-1][:4], "little")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--name", default="sparse_fuzz_operators", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    taken, crashes, long, untaken = 0, {}, 0, []
    found = list(operations())
    for name, operation in found:
        before, first, end = taken, options.first, options.first + options.count
        while first < end:
            count, ended, last = run(name, operation, range(first, end))
            taken, first = taken + count, last + 1
            if ended is None:
                break
            if ended == signal.SIGALRM:
                long += 1
            else:
                crashes.setdefault(name, {})[last] = signal.Signals(ended).name
                print(f"{name} {last}: {signal.Signals(ended).name}", flush=True)
        if taken == before:
            untaken.append(name)
    calls = {"operations": len(found), "numbers": [options.first, options.first + options.count], "taken": taken}
    write(options.name, {**calls, "longer": long, "never_taken": untaken, "crashes": crashes})
    raise SystemExit(len(crashes) > 0)


if __name__ == "__main__":
    main()
