import dataclasses

import pytest

from str_triton.rnn.data import KNOWN
from str_triton.rnn.methods import build, make_optimizer, target_text
from str_triton.rnn.models import Architecture
from str_triton.rnn.recipes import PUBLISHED, RECIPES, Config, recipe_for, resolve, without_address
from str_triton.rnn.train import COMMAND_LINE, first_candidate, learning_rate
from str_triton.training.errors import UserError
from str_triton.training.options import field_docs
from tests.messages import holds


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole(name: str):
    config = resolve(RECIPES[name]())
    assert config.recipe == name
    assert config.task == ("lm" if name == "text-lstm" else "classify")
    assert RECIPES[name].__doc__


def test_help_names_every_data_set():
    assert not [name for name in KNOWN if name not in field_docs(Config)["data"]]


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ([], "japanese-vowels-gru"),
        (["--data", "text:file"], "text-lstm"),
        (["--data", "hub:NAME:COLUMN"], "text-lstm"),
        (["--data", "text", "--task", "classify"], "text-lstm"),
        (["--data", "hub:NAME"], "spoken-gru"),
        (["--data", "har:file"], "spoken-gru"),
    ],
)
def test_the_data_choose_the_recipe(options: list[str], recipe: str):
    assert COMMAND_LINE.read(options).recipe == recipe


def test_the_papers_recipes_have_its_settings():
    for name, hidden in (("google12-fastgrnn", 100), ("har2-fastgrnn", 80)):
        config = resolve(RECIPES[name]())
        assert (config.epochs, config.batch_size, config.lr, config.hidden_size) == (300, 100, 1e-2, hidden)
        assert (config.method, config.cell, config.raw_threshold_init) == ("str", "fastgrnn", -10.0)
        assert [learning_rate(config, 10, step) for step in (0, 1999, 2000, 2999)] == [1e-2, 1e-2, 1e-3, 1e-3]


@pytest.mark.parametrize(("method", "decay"), [("str", 1e-3), ("str-exact", 0.0)])
def test_the_papers_decay_of_spectra_is_for_its_own_method(method: str, decay: float):
    config = resolve(dataclasses.replace(RECIPES["har2-fastgrnn"](), method=method))
    model, _ = build(config, Architecture("classify", "fastgrnn", inputs=9, outputs=2, hidden_size=16))
    groups = {group["name"]: group["weight_decay"] for group in make_optimizer(config, model).param_groups}
    assert groups["spectra"] == decay
    assert groups.get("thresholds", 0.0) == decay


def test_describe_prints_everything_and_trains_nothing(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as leaving:
        COMMAND_LINE.read(["har2-fastgrnn", "--epochs", "9", "--describe"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        if field.name not in ("recipe", "describe", "resume", "run_dir"):
            assert f"\n{field.name.replace('_', '-')} " in text
    assert "epochs              9\n" in text
    assert PUBLISHED["har2-fastgrnn"] in text
    assert "(8, 7)            0.001   94.88       95.59" in text


def test_a_target_is_made_definite():
    assert resolve(Config(recipe="spoken-gru")).target_compression == 3.0
    given = resolve(Config(recipe="spoken-gru", target_params=9000))
    assert (given.target_params, given.target_compression, given.target_rank) == (9000, None, None)
    assert resolve(RECIPES["japanese-vowels-gru"]()).target_rank
    assert resolve(Config(recipe="spoken-gru", method="dense")).target_compression is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "str", "target_rank": 9}, "--target-rank 9 .. --method str"),
        ({"method": "str-exact", "ranks": "9,8"}, "--ranks 9,8 .. --method str-exact"),
        ({"method": "fixed", "ranks": "9"}, "--ranks .. two whole numbers .. got '9'"),
        ({"method": "fixed", "ranks": "9,0"}, "--ranks .. two whole numbers .. got '9,0'"),
        ({"target_rank": 9, "target_compression": 2.0}, "--target-rank 9 .. --target-compression 2.0"),
        ({"task": "lm", "data": "text", "bidirectional": True}, "--bidirectional"),
        ({"task": "lm", "data": "har:DIR", "bidirectional": True}, "--task lm .. 'har:DIR'"),
        ({"method": "svd-finetune", "epochs": 1}, "--epochs 1 .. at least 2 .. --method svd-finetune"),
        ({"target_params": 0}, "--target-params 0 .. at least 1"),
        ({"max_norm": float("nan")}, "--max-norm nan .. 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict, message: str):
    with pytest.raises(UserError) as refusal:
        resolve(Config(recipe="spoken-gru", **fields))
    assert holds(str(refusal.value), message)


def test_the_recipe_for_a_configuration_does_not_depend_on_its_recipe():
    assert recipe_for(Config(recipe="text-lstm", data="japanese-vowels")) == "japanese-vowels-gru"


@pytest.mark.parametrize(
    ("method", "epochs", "first"),
    [
        ("str-exact", 10, 3),
        ("str-exact", 1, 1),
        ("str-exact", 31, 10),
        ("str", 300, 270),
        ("dense", 5, 0),
        ("fixed", 5, 0),
        ("svd-finetune", 5, 3),
    ],
)
def test_epochs_that_may_be_chosen(method: str, epochs: int, first: int):
    assert first_candidate(Config(recipe="spoken-gru", method=method, epochs=epochs)) == first


def test_svd_finetune_goes_through_the_learning_rate_twice():
    config = Config(recipe="spoken-gru", method="svd-finetune", epochs=6, warmup_epochs=1.0, lr=1.0)
    rates = [learning_rate(config, 10, step) for step in range(60)]
    assert rates[:30] == pytest.approx(rates[30:])
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert max(rates[29], rates[0], rates[30]) < 0.06


@pytest.mark.parametrize(
    ("options", "figure"),
    [
        ({"target_rank": 1400}, "1,400"),
        ({"target_params": 65_000}, "65,000"),
        ({"target_compression": 2.5}, "2.5"),
        ({"ranks": "9,8", "method": "fixed"}, "9,8"),
        ({"method": "dense"}, "none"),
    ],
)
def test_the_target_in_words_has_its_figure_and_method(options: dict, figure: str) -> None:
    config = Config(recipe="x", **options)
    assert figure in target_text(config)
    assert config.method in target_text(config)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("text:a", "text:/b/c", True),
        ("text:a", "text", False),
        ("har:a", "har:b", True),
        ("hub:a@x:y", "hub:b@x:y", True),
        ("hub:a:y", "hub:b:z", False),
        ("hub:a@x", "hub:a", False),
        ("spoken:yes,no", "spoken:yes,on", False),
    ],
)
def test_the_kind_and_the_column_of_the_data_stay(before: str, now: str, same: bool):
    assert (without_address(before) == without_address(now)) == same
