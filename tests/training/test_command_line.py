import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from str_triton.cnn import config as cnn_config
from str_triton.rnn import recipes as rnn_recipes
from str_triton.training.command_line import CommandLine
from str_triton.training.config import RunConfig, make_accelerator
from str_triton.training.errors import UserError
from str_triton.training.options import field_docs, group_titles
from tests.messages import holding


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    groups: ClassVar = {"options of this test": "lr data data_dir"}

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
    "train-cnn", "Trains.", {"small": small, "large": large}, lambda config: config.data, frozenset({"data_dir"})
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
    with pytest.raises(UserError, match=r"no recipe huge.* small or large"):
        COMMAND_LINE.read(["huge"])


@pytest.mark.parametrize("args", [["--lr", "fast"], ["--recipe", "large"], ["--device", "abacus"], ["--lr"]])
def test_options_that_do_not_parse_are_one_line(args: list[str]):
    with pytest.raises(UserError, match=args[0]) as error:
        COMMAND_LINE.read(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "90%"], "--lr 90%: .* number.* 0.9"),
        (["--seed", "1.5"], "--seed 1.5: .*whole number"),
        (["--data-dri", "x"], "--data-dri; .*--data-dir"),
        (["--device", "cup"], "--device cup: .* cpu"),
        (["--lr"], "--lr: .*value"),
        (["--lr", "--seed", "3"], "--lr: .*value"),
        (["--describe=yes"], "--describe: .*no value"),
        (["smal"], "smal; .*small"),
        (["--lr", "0.2", "large"], r"large .*options.* python cnn/train.py large"),
        (["--describe", "yes"], "word.* yes"),
    ],
    ids=" ".join,
)
def test_wrong_options_say_what_to_do(args: list[str], message: str):
    with pytest.raises(UserError, match=message):
        COMMAND_LINE.read(args)


def test_underscores_negative_numbers_and_none_are_taken():
    assert COMMAND_LINE.read(["--data_dir", "-x", "--lr", "-1e-4"]) == dataclasses.replace(
        small(), data_dir="-x", lr=-1e-4
    )
    assert COMMAND_LINE.read(["--data-dir", "none"]).data_dir is None
    assert COMMAND_LINE.read(["--describe", "--no-describe"]) == small()


@pytest.mark.parametrize("kind", [cnn_config.Config, rnn_recipes.Config])
def test_every_option_of_the_programs_is_in_a_group_and_has_a_text(kind: type):
    fields = {field.name for field in dataclasses.fields(kind) if "hidden" not in field.metadata}
    titles, texts = group_titles(kind), field_docs(kind)
    assert not [name for name in fields if titles[name] == "other" or not texts.get(name)]
    assert titles.keys() >= fields


@pytest.mark.parametrize("columns", [60, 120])
def test_help_wraps_at_the_width_of_the_terminal(
    columns: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        COMMAND_LINE.read(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert columns / 2 < max(map(len, lines)) <= columns


def test_a_run_of_another_program_says_so(tmp_path: Path):
    run = saved_run(tmp_path / "run", small())
    (tmp_path / "run" / "config.json").write_text('{"cell": "gru"}')
    with pytest.raises(UserError, match=r"python rnn/train.py, not .*python cnn/train.py"):
        COMMAND_LINE.read(["--resume", "--run-dir", run])


def test_help_lists_recipes_and_options(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as leaving:
        COMMAND_LINE.read(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "python cnn/train.py [RECIPE]",
        "A small one.",
        "A large one.",
        "run:",
        "machine:",
        "options of this test:",
        "--lr",
        "--seed",
        "--run-dir",
        "--[no-]resume",
        "--amp",
    ):
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
        with pytest.raises(UserError, match=holding("python cnn/train.py")):
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
