"""Reading of files of `torch.save` without running code in them, also if they hold other objects than tensors.

PyTorch's own reader for untrusted files (`weights_only=True`) is tried first. It refuses a file with one unknown
object, such as the `argparse.Namespace` or the NumPy scalar that many training scripts save beside the weights. Such a
file is read by `_Unpickler`: every global that it names becomes an inert `Opaque`, and the only functions that are
called are those of `_BUILDERS`, which make tensors and containers.
"""

import errno
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from str_triton.files import printable

LONGEST_REASON = 120
LARGEST_RATIO = 100  # the largest ratio of an archive's content to its size; torch.save does not compress


class Opaque:
    """A placeholder for an object that is neither a tensor nor a plain value. `name` is its class or function."""

    def __init__(self, name: str) -> None:
        self.name = printable(name)

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def __reduce__(self) -> tuple:
        raise TypeError(f"{self.name} was not read from its file, so it cannot be saved")


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Read a file of `torch.save`, to the CPU, without running code in it. Unknown objects become `Opaque`.

    Raises:
        ValueError: another kind of file, or a damaged one; one line that names the file.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about the pickle protocol and about storages
        try:
            return _load(file)
        except OSError as error:
            if error.errno not in (None, errno.EINVAL):  # these two come from the content, such as a negative offset
                raise
            raise not_weights(path, error) from error
        except Exception as error:  # damaged bytes make torch, zipfile and pickle raise almost any type
            raise not_weights(path, error) from error


def not_weights(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """Return the error to raise for a file that cannot be read because of `error`: one line, without torch's advice."""
    return ValueError(f"{path}: not a file of weights: {_reason(error)}")


def kind_of(value: object) -> str:
    """Return the name of the type that `value` has in its file."""
    return value.name if isinstance(value, Opaque) else type(value).__name__


def _load(file: BinaryIO) -> Any:
    _check_sums(file)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # TorchScript and tar archives raise RuntimeError, which is not caught here
        file.seek(0)
        return torch.load(file, map_location="cpu", pickle_module=_PICKLE, weights_only=False)


def _check_sums(file: BinaryIO) -> None:
    """Raise BadZipFile if bytes of an archive have changed, which torch.load does not check, or if it is a zip bomb.

    The checksums of files saved with `set_crc32_options(False)` are zero. Files from before PyTorch 1.6 have none.
    """
    try:
        entries = (archive := zipfile.ZipFile(file)).infolist()
    except zipfile.BadZipFile:
        return
    size = sum(entry.file_size for entry in entries)
    if size > LARGEST_RATIO * file.seek(0, os.SEEK_END):
        raise zipfile.BadZipFile(f"it would unpack to {size:,} bytes")
    for entry in entries:
        if entry.CRC:
            with archive.open(entry) as content:
                while content.read(2**20):
                    pass


def _reason(error: Exception) -> str:
    text = printable((str(error).strip() or type(error).__name__).splitlines()[0]).split(". ")[0][:LONGEST_REASON]
    if "TorchScript" in text:
        return "it is a TorchScript archive; save the module's state_dict() with torch.save"
    # Messages of torch, safetensors and zipfile describe the file. Those of pickle only name some bytes in it.
    says_why = (
        isinstance(error, RuntimeError | SafetensorError | OSError | zipfile.BadZipFile) and "weights_only" not in text
    )
    return f"it is damaged or of another kind{f' ({text})' if says_why else ''}"


@dataclass(frozen=True)
class _Builder:
    """A function that a file may call. Files cannot create a `_Builder`, so its type shows that it is allowed."""

    call: Callable[..., Any]


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor:
    """Rebuild a plain tensor. `rest` is requires_grad, hooks, and the bits of conjugate and negative views."""
    metadata = rest[2] if len(rest) > 2 else None
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict(), metadata)


def _tensor_of_dtype(storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor:
    """Rebuild a tensor of a dtype without a storage class, such as uint16: the dtype comes after the hooks."""
    return torch._utils._rebuild_tensor_v3(storage, offset, size, stride, False, OrderedDict(), *rest[2:])


def _subclass(make: object, kind: object, args: tuple, state: object) -> Any:
    """Rebuild a tensor of a subclass, or with attributes, as a plain tensor."""
    return make.call(*args) if isinstance(make, _Builder) else Opaque("tensor subclass")


def _first(tensor: Any, *rest: Any) -> Any:
    return tensor


def _empty(*default_factory: Any) -> dict:
    return {}


_BUILDERS = {
    "torch._utils._rebuild_tensor": _Builder(_tensor),
    "torch._utils._rebuild_tensor_v2": _Builder(_tensor),
    "torch._utils._rebuild_tensor_v3": _Builder(_tensor_of_dtype),
    "torch._utils._rebuild_parameter": _Builder(_first),
    "torch._utils._rebuild_parameter_with_state": _Builder(_first),
    "torch._tensor._rebuild_from_type_v2": _Builder(_subclass),
    "torch.Size": _Builder(tuple),
    "collections.OrderedDict": _Builder(dict),
    "collections.defaultdict": _Builder(_empty),
    "builtins.set": _Builder(set),
    "__builtin__.set": _Builder(set),
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler without the opcodes that call or change objects."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    # What the base class has besides its documented methods: the stack of values, and ways to add to it and to take all
    # values behind a mark.
    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> object:
        path = f"{module}.{name}"
        if path in _BUILDERS:
            return _BUILDERS[path]
        if path == "torch.storage.UntypedStorage":
            return torch.UntypedStorage  # torch's reader of storages compares with it
        value = vars(torch).get(name) if module == "torch" else None
        return value if isinstance(value, torch.dtype) else Opaque(path)

    def _instantiate(self, klass: object, args: Any) -> None:  # for the opcodes INST and OBJ
        self.append(_made(klass, args))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_binpersid(self) -> None:
        identity = self.stack.pop()
        if isinstance(identity, tuple) and len(identity) > 1 and identity[0] == "module":
            self.append(identity[1])  # the class of a whole module, in files from before PyTorch 1.6
        else:
            self.append(self.persistent_load(identity))

    def load_build(self) -> None:
        self.stack.pop()  # the state of an object: attributes, or the argument of its __setstate__

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is set:
            self.stack[-1].update(items)

    def _extend(self, items: list) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def _update(self, items: list) -> None:
        if type(self.stack[-1]) is dict:
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BINPERSID[0]: load_binpersid,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
    }


def _made(maker: object, args: Any) -> Any:
    """Return `maker(*args)`, a tensor or container, if `maker` is a `_Builder`, otherwise an `Opaque`."""
    if isinstance(maker, _Builder):
        return maker.call(*args)
    return Opaque(kind_of(maker))


def _load_pickle(file: BinaryIO, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# The attributes of a pickle module that torch.load uses.
_PICKLE = SimpleNamespace(__name__="str_triton's reader", Unpickler=_Unpickler, load=_load_pickle)
