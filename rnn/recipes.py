"""The configuration of a training run, and the named recipes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from str_triton.training.config import TrainConfig, check_ranges, require
from str_triton.training.errors import UserError
from str_triton.training.options import hidden

TARGETS = ("target_rank", "target_params", "target_compression", "ranks")
TARGETED = ("str-exact", "fixed", "svd-finetune")
CUT_ONCE = ("fixed", "svd-finetune")
DEFAULT_COMPRESSION = 3.0


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """The configuration of a run. Every field is an option of the command line; recipes set the defaults."""

    groups: ClassVar[Mapping[str, str]] = {
        "data": "data task words classes noise data_seed cache_dir",
        "network": "cell hidden_size layers bidirectional dropout pooling",
        "method and target": "method target_rank target_params target_compression ranks spectrum_decay "
        "raw_threshold_init choose",
        "training": "lr_schedule max_norm bptt",
    }

    workers: int = hidden(0)  # the examples are in memory, so no worker processes read them

    data: str = "japanese-vowels"
    """Data set: japanese-vowels, speech-commands:DIR, hub:NAME, spoken:WORD,WORD,..., har:PATH, text, text:FILE or
    hub:NAME:COLUMN (text)."""
    task: Literal["classify", "lm"] | None = None
    """Task: classify sequences, or model the next character of a text (lm); by default it depends on the data."""
    words: str | None = None
    """Words that are classes, separated by commas, besides the classes silence and unknown (for speech-commands and
    hub); by default the ten words of the published task. 'all' selects every word, without silence and unknown."""
    classes: int | None = None
    """Number of classes of har: 6, or the paper's 2."""
    noise: float = 0.0
    """Standard deviation of the noise that is added to standardised training inputs."""
    data_seed: int = 0
    """Seed of the random parts of the data: spoken clips, examples of the class unknown."""
    cache_dir: str | None = None
    """Cache directory for converted data; by default the user's cache directory."""

    cell: Literal["gru", "lstm", "fastgrnn"] = "gru"
    """Recurrent cell."""
    hidden_size: int = 128
    """Hidden units of a layer in each direction."""
    layers: int = 1
    """Number of recurrent layers."""
    bidirectional: bool = False
    """Read sequences in both directions."""
    dropout: float = 0.0
    """Dropout between the layers and before the scores."""
    pooling: Literal["last", "mean"] = "last"
    """The classifier's input: the last states, or the mean of all outputs."""

    method: Literal["str-exact", "str", "fixed", "svd-finetune", "dense"] = "str-exact"
    """Method: str-exact learns ranks that meet a target exactly; str is the paper's method, without a target; fixed
    gives every matrix the same rank from the start; svd-finetune cuts the ranks of a dense network halfway through
    training; dense cuts nothing."""
    target_rank: int | None = None
    """Target: the sum of all matrices' ranks."""
    target_params: int | None = None
    """Target: the number of parameters of the compact network."""
    target_compression: float | None = None
    """Target: the dense network's number of parameters divided by the compact network's; 3 where neither an option
    nor the recipe gives a target."""
    ranks: str | None = None
    """Ranks of the input matrices and of the recurrent matrices, such as 9,8, with --method fixed or svd-finetune."""
    spectrum_decay: float = 0.0
    """Weight decay of the spectra and of the raw thresholds with --method str (the paper's lambda)."""
    raw_threshold_init: float = -10.0
    """Initial raw threshold of --method str; the threshold is its exponential."""
    choose: Literal["validation", "last"] = "validation"
    """Choice of the epoch. validation: the best epoch on validation data, among those in which the target holds (str:
    the last tenth). last: train on training and validation data together and take the last epoch."""

    lr: float = 3e-3
    """Peak learning rate of Adam."""
    lr_schedule: Literal["cosine", "step"] = "cosine"
    """Learning rate schedule. cosine: linear warmup, then half a cosine down to zero. step: constant, then a tenth
    after two thirds of the epochs. svd-finetune runs the schedule twice, before and after the cut."""
    max_norm: float = 1.0
    """Maximum norm of the gradient; longer gradients are clipped, 0 clips none."""
    bptt: int = 100
    """Characters that a step of the language model reads from each stream."""


def without_address(data: str) -> str:
    """Return --data without the folder, the file or the name on the hub: the kind, and the configuration and column."""
    return re.sub("^((?:speech-commands|har|text):).*|^(hub:)[^@:]*", r"\1\2", data)


RESUME_MAY_CHANGE = frozenset({"cache_dir"})
RESUME_MAY_MOVE: dict[str, Callable[[Any], object]] = {"data": without_address}


def japanese_vowels_gru() -> Config:
    """Train a bidirectional GRU on bundled recordings of one vowel by nine speakers; under a minute on two cores."""
    # For so small a network, a second thread costs more time than it saves.
    return Config(
        recipe="japanese-vowels-gru",
        threads=1,
        hidden_size=96,
        bidirectional=True,
        noise=0.6,
        dropout=0.1,
        epochs=60,
        batch_size=27,
        lr=1e-2,
        choose="last",
    )


def spoken_gru() -> Config:
    """Train a GRU on twelve synthesised words (needs eSpeak NG); also fits other labelled sequences."""
    return Config(
        recipe="spoken-gru",
        data="spoken:yes,no,up,down,left,right,on,off,stop,go,start,end",
        epochs=20,
        batch_size=64,
        hidden_size=128,
        noise=0.2,
        dropout=0.1,
        pooling="mean",
        lr=1e-2,
    )


def speech5_gru() -> Config:
    """Train a GRU on five words, silence and unknown of Speech Commands, in the hub's format (needs --data)."""
    return Config(
        recipe="speech5-gru",
        data="hub:DIR",
        words="down,go,left,right,up",
        epochs=30,
        batch_size=64,
        hidden_size=96,
        dropout=0.1,
        pooling="mean",
        lr=1e-2,
    )


def har6_gru() -> Config:
    """Train a GRU on the motion data of UCI HAR, six activities, to a third of its parameters (needs --data)."""
    return Config(
        recipe="har6-gru",
        data="har:DIR",
        classes=6,
        epochs=30,
        batch_size=100,
        hidden_size=48,
        dropout=0.1,
        pooling="mean",
        lr=1e-2,
    )


def text_lstm() -> Config:
    """Train a character language model, an LSTM, on Python's help text."""
    return Config(
        recipe="text-lstm", data="text", cell="lstm", hidden_size=256, epochs=15, batch_size=32, lr=6e-3, dropout=0.2
    )


def google12_fastgrnn() -> Config:
    """Train the paper's Google-12: FastGRNN on ten words, silence and unknown of Speech Commands (needs --data)."""
    return _paper_config(
        recipe="google12-fastgrnn",
        data="speech-commands:DIR",
        words="yes,no,up,down,left,right,on,off,stop,go",
        hidden_size=100,
    )


def har2_fastgrnn() -> Config:
    """Train the paper's HAR-2: FastGRNN on the motion data of UCI HAR in two classes (needs --data)."""
    return _paper_config(recipe="har2-fastgrnn", data="har:DIR", classes=2, hidden_size=80)


def _paper_config(**own: Any) -> Config:
    return Config(
        cell="fastgrnn",
        method="str",
        epochs=300,
        batch_size=100,
        lr=1e-2,
        lr_schedule="step",
        warmup_epochs=0.0,
        spectrum_decay=1e-3,
        raw_threshold_init=-10.0,
        max_norm=0.0,
        **own,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "japanese-vowels-gru": japanese_vowels_gru,
    "spoken-gru": spoken_gru,
    "speech5-gru": speech5_gru,
    "har6-gru": har6_gru,
    "text-lstm": text_lstm,
    "google12-fastgrnn": google12_fastgrnn,
    "har2-fastgrnn": har2_fastgrnn,
}

# The target of a recipe where no option gives one; all other recipes have DEFAULT_COMPRESSION.
DEFAULT_TARGETS: dict[str, dict[str, int]] = {"japanese-vowels-gru": {"target_rank": 14}}

_SOURCE = "published (Kusupati et al., ICML 2020), accuracy in %; at full rank, which is"
PUBLISHED = {
    "google12-fastgrnn": f"""{_SOURCE} (32, 100): 92.30
(rank W, rank U)  lambda  fixed rank  STR
(12, 40)          0.001   92.79       94.45
(11, 35)          0.001   92.86       94.42
(10, 31)          0.002   92.86       94.25
(9, 24)           0.005   93.18       94.45""",
    "har2-fastgrnn": f"""{_SOURCE} (9, 80): 96.10
(rank W, rank U)  lambda  fixed rank  STR
(9, 8)            0.001   94.06       95.76
(9, 7)            0.001   93.15       95.62
(8, 7)            0.001   94.88       95.59""",
}


def recipe_for(config: Config) -> str:
    """Return the recipe for the configuration's data, for runs that name no recipe."""
    if config.data == "japanese-vowels":
        return "japanese-vowels-gru"
    return "text-lstm" if _task_of(config.data) == "lm" else "spoken-gru"


def _task_of(data: str) -> Literal["classify", "lm"]:
    """Return the default task of the data. Text defaults to "lm", although a text file may hold labels."""
    kind, _, place = data.partition(":")
    return "lm" if kind == "text" or (kind == "hub" and ":" in place) else "classify"


def resolve(config: Config) -> Config:
    """Return ``config`` with its task and target filled in; raise `UserError` for invalid values or combinations."""
    if config.task is None:
        config = replace(config, task=_task_of(config.data))
    given = [name for name in TARGETS if getattr(config, name) is not None]
    options = [f"--{name.replace('_', '-')} {getattr(config, name)}" for name in given]
    if len(given) > 1:
        raise UserError(f"{' and '.join(options)} are both given: choose one")
    if given and config.method not in TARGETED:
        raise UserError(f"{options[0]}: --method {config.method} has no target; {', '.join(TARGETED)} have one")
    if config.ranks is not None:
        if config.method not in CUT_ONCE:
            raise UserError(f"{options[0]}: --method {config.method} learns its ranks; {', '.join(CUT_ONCE)} take them")
        read_ranks(config.ranks)
    if not given and config.method in TARGETED:
        config = replace(config, **DEFAULT_TARGETS.get(config.recipe, {"target_compression": DEFAULT_COMPRESSION}))
    if config.task == "lm" and _task_of(config.data) != "lm":
        raise UserError(f"--task lm needs text; for {config.data!r} use --task classify")
    if config.bidirectional and config.task == "lm":
        raise UserError("--bidirectional: a language model (--task lm) must not see the characters that follow")
    _check_ranges(config)
    return config


def read_ranks(text: str) -> tuple[int, int]:
    """Read --ranks: the ranks of the input matrices and of the recurrent matrices."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise UserError(f"--ranks must be two whole numbers from 1, such as 9,8; got {text!r}")
    return int(parts[0]), int(parts[1])


def _check_ranges(config: Config) -> None:
    check_ranges(config)
    least = 2 if config.method == "svd-finetune" else 1
    require(config, "epochs", config.epochs >= least, f"at least {least} with --method {config.method}")
    for name in ("hidden_size", "layers", "bptt"):
        require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("noise", "data_seed", "spectrum_decay", "max_norm"):
        require(config, name, 0.0 <= getattr(config, name) < float("inf"), "0 or more")
    require(config, "dropout", 0.0 <= config.dropout < 1.0, "in 0..1, below 1")
    require(config, "raw_threshold_init", abs(config.raw_threshold_init) < float("inf"), "finite")
    for name in ("target_rank", "target_params"):
        require(config, name, (getattr(config, name) or 1) >= 1 and getattr(config, name) != 0, "at least 1")
    compression = config.target_compression
    require(config, "target_compression", compression is None or 1.0 <= compression < float("inf"), "1 or more")
