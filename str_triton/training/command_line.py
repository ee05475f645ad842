"""The command line `program [RECIPE] [options]`. A recipe returns a frozen dataclass whose fields are the options."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from str_triton.arguments import nearest, unknown
from str_triton.programs import command, recipes_elsewhere, trained_by
from str_triton.training.config import RESUME_MAY_CHANGE, ConfigT, from_plain
from str_triton.training.errors import UserError, one_line
from str_triton.training.options import options_parser
from str_triton.training.run_folder import CONFIG


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[ConfigT]):
    """The command line of one program.

    Attributes:
        program: the program's name in `str_triton.programs`.
        purpose: a line about the program, for --help.
        recipes: the recipes by name.
        recipe_for: returns the recipe's name if none is given, from the options with the first recipe's defaults.
        may_change: fields that may change on resuming, besides those of every run.
        resolve: fills in a configuration's defaults; raises `UserError` for options that contradict each other.
        published: the published results by recipe, as text for --describe.
        may_move: fields with an address of data or of a network, which may change on resuming if the `Loop` finds that
            the content is the same. Each has a function that returns the rest of the value, which may not change.
    """

    program: str
    purpose: str
    recipes: Mapping[str, Callable[[], ConfigT]]
    recipe_for: Callable[[ConfigT], str]
    may_change: frozenset[str] = frozenset()
    resolve: Callable[[ConfigT], ConfigT] = lambda config: config
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)
    may_move: Mapping[str, Callable[[Any], object]] = dataclasses.field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that starts the program, as the user typed it."""
        return command(self.program)

    def read(self, args: Sequence[str]) -> ConfigT:
        """Return the configuration for ``args``; with --resume, that of the run to resume.

        Raises `UserError` for an unknown recipe, invalid options, and a run that cannot be resumed. For --help and
        --describe, prints a text and raises ``SystemExit``.
        """
        config = self.resolve(self._read(args))
        if config.describe:
            self._describe(config)
            raise SystemExit(0)
        return config

    def _read(self, args: Sequence[str]) -> ConfigT:
        word, options = self._split(args)
        config = self._parse(self.recipes[word or next(iter(self.recipes))](), options)
        if config.resume:
            return self._read_resumed(config.run_dir, word, options)
        return config if word else self._parse(self.recipes[self.recipe_for(config)](), options)

    def _read_resumed(self, run_dir: str | None, word: str | None, options: Sequence[str]) -> ConfigT:
        """Return the saved configuration with changed options. Refuse changes of options that alter the result."""
        if run_dir is None:
            raise UserError("--resume: name the directory of the run to resume with --run-dir")
        saved = saved_config(run_dir, type(next(iter(self.recipes.values()))()), self.program)
        if saved.recipe not in self.recipes:
            raise UserError(f"--resume: the run in {run_dir} has an unknown recipe, {saved.recipe!r}")
        wanted = dataclasses.replace(self._parse(saved, options), recipe=word or saved.recipe)
        for field in dataclasses.fields(saved):
            before, now = getattr(saved, field.name), getattr(wanted, field.name)
            rest = self.may_move.get(field.name, lambda value: value)
            if rest(before) != rest(now) and field.name not in RESUME_MAY_CHANGE | self.may_change:
                reason = "an option that alters the result cannot change on resuming"
                raise other_option(run_dir, field.name, before, now, reason)
        return wanted

    def changed(self, config: ConfigT) -> dict[str, tuple[Any, Any]]:
        """Return the program's own options that a resumed run is given anew: the values before and now, by field."""
        if not config.resume or config.run_dir is None:
            return {}
        saved = saved_config(config.run_dir, type(config), self.program)
        names = self.may_change | self.may_move.keys()
        values = {name: (getattr(saved, name), getattr(config, name)) for name in names}
        return {name: (before, now) for name, (before, now) in values.items() if before != now}

    def _describe(self, config: ConfigT) -> None:
        """Print the configuration, and the published results of its recipe."""
        print(f"{config.recipe}: {self.recipes[config.recipe].__doc__}\n")
        values = {field.name.replace("_", "-"): getattr(config, field.name) for field in dataclasses.fields(config)}
        width = max(map(len, values))
        for name, value in values.items():
            if name not in ("recipe", "describe", "resume", "run-dir"):
                print(f"{name:{width}}  {'none' if value is None else value}")
        if config.recipe in self.published:
            print(f"\n{self.published[config.recipe]}")

    def _split(self, args: Sequence[str]) -> tuple[str | None, list[str]]:
        """Split ``args`` into the recipe, a leading word without a dash, and the options."""
        if not args or args[0].startswith("-"):
            return None, list(args)
        if args[0] not in self.recipes:
            raise UserError(self._unknown_recipe(args[0]))
        return args[0], list(args[1:])

    def _unknown_recipe(self, name: str) -> str:
        """Return one line about a recipe that this program does not have."""
        elsewhere = None if nearest(name, list(self.recipes)) else recipes_elsewhere(name, self.program)
        return f"{elsewhere or unknown('recipe', name, list(self.recipes))} ({self.command} --help)"

    def _parse(self, default: ConfigT, options: Sequence[str]) -> ConfigT:
        """Return ``default`` with the options that ``options`` give."""
        width = max(map(len, self.recipes))
        lines = [f"  {name:{width}}  {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in self.recipes.items()]
        description = "\n".join([self.purpose, "", "recipes:", *lines])
        parser = options_parser(default, prog=f"{self.command} [RECIPE]", description=description)
        values, words = parser.parse_known_args(options)
        for word in words:
            if word in self.recipes:
                raise UserError(f"the recipe {word} belongs before the options: {self.command} {word} [OPTIONS]")
            parser.error(f"one word too many: {word}")
        return dataclasses.replace(default, **vars(values))


def other_option(run_dir: str | Path, name: str, before: object, now: object, reason: str) -> UserError:
    """Return the error for a run in ``run_dir`` that is resumed with another value of the field ``name``."""
    return UserError(f"--resume: the run in {run_dir} has {name.replace('_', '-')} {before}, not {now}; {reason}")


def saved_config(run_dir: str | Path, kind: type[ConfigT], program: str) -> ConfigT:
    """Read the configuration of the run in ``run_dir``. Raise `UserError` if there is none of ``program``."""
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise UserError(f"--resume: there is no run in {run_dir} (no {CONFIG}); start one there without --resume")
    require_trained_by(run_dir, program)
    try:
        return from_plain(kind, json.loads(path.read_text()))
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a configuration of {command(program)}: {one_line(error)}") from error


def require_trained_by(run_dir: str | Path, program: str) -> None:
    """Raise `UserError` if another program than ``program`` wrote the run in ``run_dir``."""
    other = trained_by(run_dir)
    if other not in (None, program):
        raise UserError(f"{run_dir} is a run of {command(other)}, not of {command(program)}")
