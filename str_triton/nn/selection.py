"""The choice of the weights that `sparsify` takes, and of those that the user leaves dense."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from str_triton.nn.kinds import weight_attributes
from str_triton.nn.layers import refusal, str_class
from str_triton.nn.matrices import owners, weights_of
from str_triton.nn.parametrization import parametrization_refusal
from str_triton.nn.thresholded import weight_name

Filter = Callable[[str, nn.Module], bool] | str | nn.Module | Iterable[str | nn.Module]


@dataclass(frozen=True)
class Candidate:
    """A use of a weight of two or more dimensions, under one of its module's names.

    Attributes:
        module_name: a name of the module.
        module: the module that uses the weight.
        attribute: the module's attribute that holds the weight.
        is_known: `sparsify` knows the kind, or the user has named the weight in `parameters`.
        is_named: the user has named the weight in `parameters`.
    """

    module_name: str
    module: nn.Module
    attribute: str
    is_known: bool
    is_named: bool = False

    @property
    def parameter_name(self) -> str:
        """The name that `named_parameters` gives."""
        return f"{self.module_name}.{self.attribute}".lstrip(".")

    @property
    def label(self) -> str:
        """The name for messages, which `exclude` takes."""
        return weight_name(self.module_name, self.attribute) or type(self.module).__name__

    @property
    def parameter(self) -> nn.Parameter | None:
        """The weight, or None if it is computed from other parameters."""
        return dict(self.module._parameters.items()).get(self.attribute)  # torch.jit's table has no get.

    @property
    def is_frozen(self) -> bool:
        """Check whether the weight does not train."""
        return self.parameter is not None and not self.parameter.requires_grad

    def matches(self, pattern: str) -> bool:
        """Return whether a pattern names the weight or its module."""
        return fnmatchcase(self.module_name, pattern) or fnmatchcase(self.parameter_name, pattern)


@dataclass(frozen=True)
class Selection:
    """The weights to threshold, and the ones left dense by the user's word or because they are frozen."""

    chosen: list[Candidate]
    left: list[Candidate]


def select(
    model: nn.Module, include: Filter | None, exclude: Filter | None, parameters: Iterable[str] | None
) -> Selection:
    """Choose the weights to threshold; the arguments, errors and warning are those of `sparsify`."""
    candidates = _candidates(model, [parameters] if isinstance(parameters, str) else list(parameters or ()))
    known = [candidate for candidate in candidates if candidate.is_known]
    if not known:
        raise ValueError(f"nothing to sparsify: {type(model).__name__} has no weight of a kind that sparsify knows")
    named = {c for c in known if c.is_named}
    wanted = set(known) if include is None else _matching(known, include, "include") | named
    excluded = set() if exclude is None else _matching(candidates, exclude, "exclude")
    # Whoever names a frozen weight wants it.
    frozen = {c for c in candidates if c.is_frozen and c not in named} if include is None else set()
    chosen = [candidate for candidate in known if candidate in wanted - excluded - frozen]
    if not chosen:
        raise ValueError(
            f"nothing to sparsify: include and exclude leave none of {len(known)} weights"
            + (f", {len(frozen)} of which are frozen (requires_grad=False)" if frozen else "")
        )
    _check_refusals(chosen)
    _check_sharing(model, chosen)
    _warn_of_frozen([candidate for candidate in known if candidate in frozen - excluded])
    left = set(candidates).difference(chosen) if include is not None else excluded | frozen
    return Selection(chosen, [candidate for candidate in candidates if candidate in left])


def refusal_of(candidate: Candidate) -> str | None:
    """Return why a weight cannot be thresholded; None if it can."""
    return parametrization_refusal(candidate.module, candidate.attribute) if needs_parametrization(candidate) else None


def needs_parametrization(candidate: Candidate) -> bool:
    """Return whether no thresholded layer of ours computes what the weight's module computes, or the user says so."""
    if candidate.is_named:
        return True
    is_layer = candidate.attribute == "weight" and str_class(candidate.module) is not None
    return not is_layer or refusal(candidate.module) is not None


def _candidates(model: nn.Module, patterns: list[str]) -> list[Candidate]:
    found = []
    unmatched = set(patterns)
    for name, module in owners(model, remove_duplicate=False):
        known = weight_attributes(module)
        for attribute in dict.fromkeys((*known, *weights_of(module))):
            candidate = Candidate(name, module, attribute, attribute in known)
            matching = {pattern for pattern in patterns if fnmatchcase(candidate.parameter_name, pattern)}
            unmatched -= matching
            found.append(Candidate(name, module, attribute, True, is_named=True) if matching else candidate)
    if unmatched:
        names = ", ".join(repr(pattern) for pattern in patterns if pattern in unmatched)
        raise ValueError(f"{names} in parameters matches no parameter of two or more dimensions")
    return found


def _matching(candidates: list[Candidate], which: Filter, argument: str) -> set[Candidate]:
    if callable(which) and not isinstance(which, nn.Module):
        return {c for c in candidates if c.is_known and which(c.module_name, c.module)}
    matching = set()
    for item in which if isinstance(which, Iterable) and not isinstance(which, str | nn.Module) else [which]:
        if isinstance(item, nn.Module):
            inside, label = set(item.modules()), type(item).__name__
            new = {candidate for candidate in candidates if candidate.module in inside}
        elif not isinstance(item, str):
            raise TypeError(f"{argument} takes names, patterns, modules or a function of (name, module), got {item!r}")
        else:
            label = repr(item)
            new = {candidate for candidate in candidates if candidate.matches(item)}
        if not new:
            hint = "; parameters= names weights of other modules" if argument == "include" else ""
            raise ValueError(f"{label} in {argument} matches no weight{hint}")
        matching |= new
    return matching


def _check_refusals(chosen: list[Candidate]) -> None:
    refused: dict[str, list[str]] = defaultdict(list)
    for candidate in chosen:
        if reason := refusal_of(candidate):
            refused[reason].append(candidate.label)
    if refused:
        reasons = "; ".join(f"{', '.join(labels)} ({reason})" for reason, labels in refused.items())
        labels = [label for labels in refused.values() for label in labels]
        raise ValueError(f"cannot be thresholded: {reasons}; {_how_to_exclude(labels)}")


def _check_sharing(model: nn.Module, chosen: list[Candidate]) -> None:
    uses: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            uses[id(parameter)].append(f"{name}.{attribute}".lstrip("."))
    taken = {candidate.parameter_name for candidate in chosen}
    half = [
        (candidate.label, other.removesuffix(".weight"))
        for candidate in chosen
        for other in uses[id(candidate.parameter)]
        if other not in taken
    ]
    if half:
        pairs = "; ".join(f"{own} shares its weight with {other}" for own, other in half)
        both = [label for pair in half for label in pair]
        raise ValueError(f"{pairs}: include both or exclude both ({_how_to_exclude(both)})")


def _how_to_exclude(labels: list[str]) -> str:
    return f"leave them dense with exclude={list(dict.fromkeys(labels))}"


def _warn_of_frozen(frozen: list[Candidate]) -> None:
    if frozen:
        names = ", ".join({id(c.parameter): c.label for c in reversed(frozen)}.values())
        warnings.warn(
            f"sparsify leaves frozen weights (requires_grad=False) dense, unless include names them: {names}",
            stacklevel=4,
        )
