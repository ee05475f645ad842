import dataclasses

import pytest

from str_triton.cnn.config import METHODS, Config
from str_triton.cnn.data.sources import KNOWN
from str_triton.cnn.models import build
from str_triton.cnn.published import DENSE, POINTS, PUBLISHED
from str_triton.cnn.recipes import RECIPES, recipe_for, resolve
from str_triton.cnn.train import COMMAND_LINE
from str_triton.cnn.training_schedule import announce_pruning, learning_rate, pruning_start
from str_triton.training.errors import UserError
from str_triton.training.options import field_docs
from tests.messages import holding

IMAGES = 1_281_167
STEPS = IMAGES // 256
EXACT = [f"resnet50-str-exact-{percent}" for percent in (80, 90, 95, 98, 99)]
FINETUNING = [f"{name}-finetune" for name in EXACT]


def describe(capsys: pytest.CaptureFixture, *args: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        COMMAND_LINE.read([*args, "--describe"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def test_there_is_a_recipe_for_every_published_point():
    points = [name for name in RECIPES if "-str-" in name and "exact" not in name]
    assert [name for name in points if name.startswith("resnet50-")] == [
        f"resnet50-str-{sparsity}"
        for sparsity in (
            *("79.55", "81.27", "87.70", "90.23", "90.55", "94.80", "95.03", "95.15"),
            *("96.11", "96.53", "97.78", "98.05", "98.22", "98.79", "98.98", "99.10"),
        )
    ]
    assert [name for name in points if name.startswith("mobilenetv1-")] == [
        f"mobilenetv1-str-{sparsity}" for sparsity in ("75.28", "79.07", "85.80", "89.01", "89.62")
    ]
    others = {"digits", "fashion-mnist", "cifar10", "resnet50-dense", "mobilenetv1-dense", *EXACT, *FINETUNING}
    others.add("mobilenetv1-finetune")
    assert set(RECIPES) == {*points, *others}
    assert set(PUBLISHED) == set(RECIPES) - {"digits", "fashion-mnist", "cifar10", "mobilenetv1-finetune"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole(name: str):
    config = resolve(RECIPES[name]())
    assert config.recipe == name
    assert RECIPES[name].__doc__
    assert "\n" not in RECIPES[name].__doc__.strip()
    if name in PUBLISHED:
        assert (config.batch_size, config.momentum, config.label_smoothing) == (256, 0.875, 0.1)
        schedule = (10, 0.128, 1.0) if name in FINETUNING else (100, 0.256, 5.0)
        assert (config.epochs, config.lr, config.warmup_epochs) == schedule
        assert config.data == "hub:ILSVRC/imagenet-1k"


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_every_published_point_describes_itself(point, capsys: pytest.CaptureFixture):
    text = describe(capsys, point.name)
    options = dict(line.split(maxsplit=1) for line in text.splitlines()[2:] if line)
    for field in dataclasses.fields(Config):
        assert field.name in ("recipe", "describe", "resume", "run_dir") or field.name.replace("_", "-") in options
    assert float(options["weight-decay"]) == point.weight_decay
    assert float(options["raw-threshold-init"]) == point.raw_threshold_init
    assert (options["method"], options["gradient"], options["model"]) == ("str", "masked", point.model)
    assert (options["target-sparsity"], options["lr-schedule"]) == ("none", "epoch-cosine")
    assert f"{DENSE[point.model].title} on ImageNet as published: {point.sparsity:.2f} % sparse" in text
    assert text.endswith(f"{point.sparsity:.2f} %  {point.top1:.2f} %  {point.params:>9.2f}M  {point.flops}M\n")


def test_descriptions_by_hand(capsys: pytest.CaptureFixture):
    assert describe(capsys, "resnet50-str-90.23").endswith(
        """
published (Kusupati et al., ICML 2020), ResNet50 on ImageNet-1K, FLOPs at 224x224:
        sparsity  top-1       weights  FLOPs
dense    0.00 %  77.01 %  25,502,912  4,089,284,608
STR     90.23 %  74.31 %       2.49M  343M
"""
    )
    assert "71.95 % top-1, 4,209,088 weights, 568,740,352 FLOPs" in describe(capsys, "mobilenetv1-dense")
    text = describe(capsys, "resnet50-str-exact-98", "--epochs", "9")
    assert "at 98 %: GMP 57.90 %, DNW 58.20 %; 98 % leave 510,058 weights" in text
    assert "STR     98.05 %  61.46 %" in text
    assert {"9", "0.98"} <= set(text.split())


def test_a_few_settings_by_hand():
    config = resolve(RECIPES["mobilenetv1-str-89.01"]())
    assert (config.weight_decay, config.raw_threshold_init) == (3.751757813e-5, -12800.0)
    config = resolve(RECIPES["resnet50-str-97.78"]())
    assert (config.weight_decay, config.raw_threshold_init) == (5.217578125e-5, -12800.0)
    for name, target in zip(EXACT + FINETUNING, 2 * (0.8, 0.9, 0.95, 0.98, 0.99), strict=True):
        config = resolve(RECIPES[name]())
        assert (config.method, config.target_sparsity, config.weight_decay) == ("str-exact", target, 3.0517578125e-5)
        assert (config.distribution, config.gradient, config.lr_schedule) == ("fixed", "switched", "cosine")
    config = resolve(RECIPES["mobilenetv1-dense"]())
    assert (config.method, config.model, config.weight_decay) == ("dense", "mobilenetv1", 2**-15)
    assert build(config.model).fc.out_features == 1000


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        COMMAND_LINE.read(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in RECIPES)


def test_help_names_every_data_set_and_method():
    texts = field_docs(Config)
    assert not [name for name in KNOWN if name not in texts["data"]]
    assert not [name for name in METHODS if f"{name}: " not in texts["method"]]


@pytest.mark.parametrize(
    ("data", "recipe"),
    [
        ("digits", "digits"),
        ("cifar10", "cifar10"),
        ("mnist", "fashion-mnist"),
        ("emnist:letters", "fashion-mnist"),
        ("hub:uoft-cs/cifar10", "cifar10"),
        ("hub:/data/CIFAR-10/", "cifar10"),
        ("hub:ILSVRC/imagenet-1k", "resnet50-str-exact-90"),
        ("imagefolder:/data/ImageNet/", "resnet50-str-exact-90"),
    ],
)
def test_the_recipe_where_none_is_named(data: str, recipe: str):
    assert recipe_for(Config(recipe="digits", data=data)) == recipe


@pytest.mark.parametrize("data", ["imagefolder:flowers", "hub:zh-plus/tiny-imagenet", "imagefolder:imagenet/val"])
def test_images_of_unknown_size_need_a_recipe(data: str):
    with pytest.raises(UserError, match=holding(f"--data {data} .. fashion-mnist")):
        COMMAND_LINE.read(["--data", data, "--target-flops", "0.1"])
    assert COMMAND_LINE.read(["fashion-mnist", "--data", data, "--target-flops", "0.1"]).target_flops == 0.1


def targets(*args: str) -> tuple:
    config = COMMAND_LINE.read(list(args))
    return config.target_sparsity, config.target_flops, config.budget


def test_a_target_on_the_command_line_replaces_the_recipes():
    assert targets("resnet50-str-exact-95") == (0.95, None, None)
    assert targets("resnet50-str-exact-95", "--target-sparsity", "0.5") == (0.5, None, None)
    assert targets("resnet50-str-exact-95", "--target-flops", "0.1") == (None, 0.1, None)
    budget = ("--budget", "resnet50-str-95.03", "--method", "gmp")
    assert targets("resnet50-str-exact-95", *budget) == (None, None, "resnet50-str-95.03")
    assert targets("resnet50-str-exact-95", "--method", "dense") == (None, None, None)
    for more in (("--target-flops", "0.1"), ("--target-sparsity", "0.5")):
        with pytest.raises(UserError, match=r"and --budget are given: choose one$"):
            targets("resnet50-str-exact-95", *budget, *more)
    with pytest.raises(UserError, match=holding("--target-sparsity 0.5 .. --method dense .. str-exact .. gmp .. dnw")):
        targets("resnet50-str-exact-95", "--method", "dense", "--target-sparsity", "0.5")


def test_what_a_recipe_says_of_its_own_method_gives_way_to_another():
    config = COMMAND_LINE.read(["resnet50-str-90.23", "--method", "gmp"])
    assert (config.raw_threshold_init, config.gradient, config.granularity) == (None, None, None)
    assert (config.mask_interval, config.distribution, config.target_sparsity) == (10, "uniform", 0.9)
    config = COMMAND_LINE.read(["resnet50-str-90.23"])
    assert (config.raw_threshold_init, config.gradient, config.granularity) == (-3200.0, "masked", "layer")
    assert COMMAND_LINE.read(["--method", "str"]).raw_threshold_init == -5.0
    assert COMMAND_LINE.read(["--method", "rigl"]).mask_interval == 100


@pytest.mark.parametrize("name", RECIPES)
def test_resolving_twice_changes_nothing(name: str):
    """A resumed run resolves its saved configuration again."""
    config = resolve(RECIPES[name]())
    assert resolve(config) == config


# From the paper's lambda, s_init and schedule alone.
STARTS = [39, 37, 31, 28, 24, 21, 24, 19, 10, 20, 16, 15, 14, 12, 11, 10, 17, 8, 21, 21, 18]


@pytest.mark.parametrize("number", range(21), ids=lambda number: POINTS[number].name)
def test_pruning_starts_in_the_papers_epoch(number: int):
    assert len(STARTS) == len(POINTS)
    assert pruning_start(RECIPES[POINTS[number].name](), STEPS)[0] == STARTS[number]


def test_a_last_small_batch_changes_no_start():
    for point, start in zip(POINTS, STARTS, strict=True):
        if point.sparsity in (81.27, 90.23, 89.01):  # the closest
            assert pruning_start(RECIPES[point.name](), STEPS + 1)[0] == start


def test_the_start_is_announced(capsys: pytest.CaptureFixture):
    config = RECIPES["resnet50-str-90.23"]()
    announce_pruning(config, STEPS)
    error = capsys.readouterr().err
    assert "epoch 28 of 100" in error
    assert "from -3200 to -10\n" in error
    announce_pruning(dataclasses.replace(config, epochs=10), STEPS)
    error = capsys.readouterr().err
    assert error.startswith("warning: nothing will be pruned: ")
    assert " from -3200 to -" in error
    assert "in 10 epochs" in error
    announce_pruning(dataclasses.replace(config, raw_threshold_init=-5.0), STEPS)
    assert capsys.readouterr().err == ""


def test_the_papers_learning_rate_stands_still_within_an_epoch():
    config = Config(recipe="digits", epochs=9, warmup_epochs=3.0, lr=3.0, lr_schedule="epoch-cosine")
    rates = [learning_rate(config, 4, step) for step in range(36)]
    by_epoch = rates[::4]
    assert rates == [rate for rate in by_epoch for _ in range(4)]
    assert by_epoch[:4] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert by_epoch[6] == pytest.approx(1.5)  # halfway down
    assert by_epoch[8] == pytest.approx(1.5 * (1 - 0.75**0.5))
