import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from str_triton.training.command_line import CommandLine
from str_triton.training.config import RunConfig, make_accelerator
from str_triton.training.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    lr: float = 0.1
    """Learning rate."""
    data: str = "small"
    data_dir: str | None = None


def small() -> Config:
    """A small one."""
    return Config(recipe="small")


def large() -> Config:
    """A large one."""
    return Config(recipe="large", data="large", lr=0.5)


COMMAND_LINE = CommandLine(
    "train", "Trains.", {"small": small, "large": large}, lambda config: config.data, frozenset({"data_dir"})
)


def saved_run(path: Path, config: Config) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return str(path)


def test_the_first_recipe_is_the_default():
    assert COMMAND_LINE.read([]) == small()
    assert COMMAND_LINE.read(["--lr", "0.3"]).lr == 0.3


def test_a_leading_word_is_the_recipe_and_options_change_it():
    assert COMMAND_LINE.read(["large"]) == large()
    assert COMMAND_LINE.read(["large", "--lr=0.2"]) == dataclasses.replace(large(), lr=0.2)


def test_without_a_word_the_options_choose_the_recipe():
    assert COMMAND_LINE.read(["--data", "large"]) == large()
    assert COMMAND_LINE.read(["small", "--data", "large"]) == dataclasses.replace(small(), data="large")


def test_an_unknown_recipe_lists_the_names():
    with pytest.raises(UserError, match=r"no recipe 'huge'; the recipes are small, large"):
        COMMAND_LINE.read(["huge"])


@pytest.mark.parametrize("args", [["--lr", "fast"], ["--recipe", "large"], ["--device", "abacus"], ["--lr"]])
def test_options_that_do_not_parse_exit_with_2(args: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as leaving:
        COMMAND_LINE.read(args)
    assert leaving.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_help_lists_recipes_and_options(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as leaving:
        COMMAND_LINE.read(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for part in ("train [RECIPE]", "A small one.", "A large one.", "--lr", "--seed", "--run-dir", "--resume", "--amp"):
        assert part in text
    assert "--recipe" not in text


def test_resume_takes_the_options_of_the_run(tmp_path: Path):
    run = saved_run(tmp_path / "run", dataclasses.replace(large(), lr=0.7, seed=5))
    again = ["--resume", "--run-dir", run]
    expected = dataclasses.replace(large(), lr=0.7, seed=5, resume=True, run_dir=run)
    assert COMMAND_LINE.read(again) == expected
    assert COMMAND_LINE.read(["large", "--seed", "5", *again]) == expected
    assert COMMAND_LINE.read(["--workers", "3", "--data-dir", "there", *again]) == dataclasses.replace(
        expected, workers=3, data_dir="there"
    )


@pytest.mark.parametrize(
    ("change", "message"), [(["small"], "recipe large, not small"), (["--seed", "1"], "seed 0, not 1")]
)
def test_resume_refuses_changes_that_alter_the_result(tmp_path: Path, change: list[str], message: str):
    run = saved_run(tmp_path / "run", large())
    with pytest.raises(UserError, match=message):
        COMMAND_LINE.read([*change, "--resume", "--run-dir", run])


def test_resume_without_a_run_says_so(tmp_path: Path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="there is no run in"):
            COMMAND_LINE.read(["--resume", "--run-dir", str(place)])
    with pytest.raises(UserError, match="name the directory"):
        COMMAND_LINE.read(["--resume"])
    run = saved_run(tmp_path / "run", small())
    for text in ("{", "[]", '{"colour": "red"}'):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(UserError, match="not a configuration of this program"):
            COMMAND_LINE.read(["--resume", "--run-dir", run])


@pytest.mark.parametrize(("option", "value"), [("device", "cuda"), ("amp", "fp16")])
def test_what_needs_a_gpu_says_so(option: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=f"--{option} {value}"):
        make_accelerator(dataclasses.replace(small(), **{option: value}))


def test_describe_prints_the_resolved_configuration_and_what_was_published(capsys: pytest.CaptureFixture):
    described = dataclasses.replace(
        COMMAND_LINE,
        resolve=lambda config: dataclasses.replace(config, lr=2 * config.lr),
        published={"large": "accuracy 99"},
    )
    for name, rate, ends in (("large", "1.0", "\naccuracy 99\n"), ("small", "0.2", "data-dir          none\n")):
        with pytest.raises(SystemExit) as leaving:
            described.read([name, "--describe"])
        assert leaving.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{name}: A {name} one.\n")
        assert f"\nlr                {rate}\n" in text
        assert text.endswith(ends)
