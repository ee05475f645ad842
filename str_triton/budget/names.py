"""Names of weights in a model and in wrapped copies of it."""

from typing import Any

WRAPPERS = ("module", "_orig_mod")  # in front of the names in averages, DistributedDataParallel and torch.compile


def unwrapped_names(items: dict[str, Any]) -> dict[str, Any]:
    """Return the items by their names, without the prefixes that wrappers of a model add."""
    found: dict[str, Any] = {}
    for name, item in items.items():
        parts = name.split(".")
        while len(parts) > 1 and parts[0] in WRAPPERS:
            del parts[0]
        found.setdefault(".".join(parts), item)
    return found
