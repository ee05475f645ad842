"""Comparison of a trained network's classes with those of data."""

from collections.abc import Sequence

from str_triton.training.errors import warn
from str_triton.training.interface import same_name


def class_change(theirs: Sequence[str], ours: Sequence[str], where: object) -> str | None:
    """Return in words the first of a network's classes that is another one in the data; None if there is none.

    ``theirs`` are the network's classes and ``ours`` as many of the data. If one side has numbers from 0 on in place of
    names, and the other side has names, the order cannot be compared: then warn of it, naming ``where``.
    """
    pairs = zip(theirs, ours, strict=True)
    change = next((f"its class {old!r} is {new!r} in the data" for old, new in pairs if not same_name(old, new)), None)
    if change is None or set(theirs) == set(ours):
        return change
    numbers = [str(number) for number in range(len(ours))]
    for side, names in (("the network has", theirs), ("the data have", ours)):
        if list(names) == numbers:
            warn(f"{where}: {side} numbers in place of class names, so the order of the classes cannot be compared")
            return None
    return change
