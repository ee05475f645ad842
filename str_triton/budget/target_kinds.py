"""The common parts of targets of sparsity and of ranks: a keyword that chooses the class, and messages."""

from collections.abc import Mapping
from numbers import Real
from typing import Any


class Kinds(type):
    """A class whose call gives an instance of the subclass that the keyword names."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        if hasattr(cls, "keyword"):
            return super().__call__(*args, **given)
        subclasses: list[Any] = cls.__subclasses__()
        kinds = {kind.keyword: kind for kind in subclasses}
        if unknown := sorted(given.keys() - kinds.keys()):
            raise TypeError(f"{cls.__name__} has no kind {unknown[0]!r}; it has {', '.join(kinds)}")
        named = {name: value for name, value in given.items() if value is not None}
        if args or len(named) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}; got {named or args or 'none'}")
        ((keyword, value),) = named.items()
        for number in [value] if keyword != "layers" else value.values() if isinstance(value, Mapping) else []:
            if not isinstance(number, Real) or isinstance(number, bool):
                raise TypeError(f"target {keyword} must be a number, got {number!r}")
        return kinds[keyword](value)


def require_kind(target: object, kind: Any) -> None:
    """Raise TypeError for a target that a controller cannot meet: a number, or a target of the other controller."""
    if not isinstance(target, kind):
        raise TypeError(f"target must be a {kind.__name__}, such as {kind.example}, got {target!r}")


def described(target: Any, base: str) -> str:
    """Return a target as it was written."""
    return f"{base}({target.keyword}={getattr(target, target.keyword)!r})"


def require_at_least_1(target: Any, hint: str = "") -> None:
    """Raise ValueError unless the target's value is at least 1."""
    value = getattr(target, target.keyword)
    if not value >= 1:
        hint = f"; {hint}" if hint else ""
        raise ValueError(f"target {target.keyword} must be at least 1, got {value}{hint}")
