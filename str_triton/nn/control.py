"""The mark that a controller leaves on the modules whose thresholds it sets."""

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn


@dataclass
class Control:
    """A controller's mark on the modules whose thresholds it sets.

    Attributes:
        reached: the model meets the controller's target now.
        exact: the model is inside `exact()`, where it meets the schedule's value.
        status: how far the controller is, in words, for the warning of an unfinished model.
        densified: `densify` has removed the thresholds.
        owner: a weak reference to the controller; None in a copy of the model, which no controller follows.
    """

    reached: bool = False
    exact: bool = False
    status: str = ""
    owner: weakref.ref | None = None
    warned: bool = field(default=False, repr=False)
    densified: bool = field(default=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = type(self)(self.reached, self.exact, self.status, warned=self.warned)
        return twin

    def __reduce__(self) -> tuple:
        return type(self), (self.reached, self.exact, self.status)

    @property
    def is_met(self) -> bool:
        """Check whether the model meets the target, or inside `exact()` the schedule's value.

        A controller that still exists counts: an optimizer, a state dict or a cast may have changed the weights since.
        """
        owner = None if self.owner is None or self.densified else self.owner()
        return self.exact or (self.reached and (owner is None or owner.still_meets()))

    def reach(self) -> None:
        """Note that the model meets the target now."""
        self.reached, self.warned = True, False

    @property
    def is_held(self) -> bool:
        """Check whether a controller that still exists holds the thresholds."""
        return self.owner is not None and self.owner() is not None


def controls(modules: Iterable[nn.Module]) -> list[Control]:
    """Return the marks on some modules, each once: all modules of a controller share its mark."""
    marks = (getattr(module, "control", None) for module in modules)
    return list({id(mark): mark for mark in marks if isinstance(mark, Control)}.values())


def warn_if_unfinished(model: nn.Module, stacklevel: int = 3) -> None:
    """Warn, once for each controller, that the model does not meet its controller's target."""
    warn_of_unfinished(controls(model.modules()), stacklevel + 1)


def warn_of_unfinished(marks: Iterable[Control], stacklevel: int = 3) -> None:
    """Warn, once for each of the controllers, that the model does not meet its target."""
    for control in marks:
        if control.warned or control.is_met:
            continue
        control.warned = True
        status = "its weights have changed since finish()" if control.reached else control.status
        text = (
            f"the model does not meet its controller's target ({status}): call controller.finish(), or measure inside "
            "controller.exact()"
        )
        if control.owner is None:
            text = (
                f"the model is a copy of one that did not meet its controller's target then ({status}): call "
                "controller.finish(copy), or copy the model after controller.finish()"
            )
        warnings.warn(text, stacklevel=stacklevel)
