"""Data sets of sequences: `load` reads one by its name.

`load` imports a data set's module only when it is asked for, so a data set needs no other data set's libraries.
"""

from pathlib import Path
from typing import Any

import torch

from str_triton.arguments import unknown_data
from str_triton.rnn.data.common import Data, Examples, Merged, Text, with_validation

__all__ = ["Data", "Examples", "Merged", "Text", "load", "with_validation", "words_of"]

KNOWN = (
    "japanese-vowels",
    "speech-commands:DIR",
    "hub:NAME",
    "hub:NAME:COLUMN (text)",
    "spoken:WORD,WORD,...",
    "har:PATH",
    "text",
    "text:FILE",
)
LAYOUTS = {
    "train/Inertial Signals": "write har:DIR",
    "UCI HAR Dataset": "write har:DIR",
    "testing_list.txt": "write speech-commands:DIR",
    "_background_noise_": "write speech-commands:DIR",
    "*.parquet": "write hub:DIR",
    "*/*.parquet": "write hub:DIR",
}
"""What to write for a folder whose files are like the pattern."""
WITHOUT_ARGUMENT = {form for form in KNOWN if ":" not in form}
WITH_ARGUMENT = {form.partition(":")[0] for form in KNOWN if ":" in form}
TASKS = ("classify", "lm")


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a list with commas, such as "up, down"."""
    return tuple(word.strip() for word in text.split(","))


def load(
    spec: str,
    *,
    task: str = "classify",
    seed: int = 0,
    words: tuple[str, ...] | None = None,
    classes: int | None = None,
    noise: float = 0.0,
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
) -> Data | Text:
    """Read the data set that `spec` names.

    - "japanese-vowels": the utterances that come with the project, see `load_japanese_vowels`;
    - "speech-commands:DIR": a folder in the layout of Speech Commands, see `load_speech_commands`;
    - "hub:NAME": a speech data set of the Hugging Face hub, see `load_hub`;
    - "hub:NAME:COLUMN": a column of text of the hub, for task "lm" only, see `hub_text`;
    - "spoken:WORD,WORD,...": these words, spoken by a speech synthesiser, see `load_spoken`;
    - "har:PATH": the UCI HAR folder or zip file, see `load_har`;
    - "text" and "text:FILE": Python's own help or a file, see `load_text` (task "lm") and `load_snippets` ("classify").

    task: "classify" returns `Data`, "lm" returns `Text`. seed: for the parts of a data set that are drawn at random.
    words: the classes (speech commands only). classes: 6 or 2 (har only). noise: standard deviation of the noise that
    training adds to standardised vectors. device: where the features are kept or computed. cache_dir: the folder of the
    cache.

    Raises ValueError or OSError. The message is one line that names the fault in the data, or the arguments that do not
    fit the data.
    """
    kind, _, place = spec.partition(":")
    if spec not in WITHOUT_ARGUMENT and not (kind in WITH_ARGUMENT and place):
        raise ValueError(unknown_data(spec, KNOWN, LAYOUTS))
    if place == "DIR" and not Path(place).exists():  # what recipes have where the user's folder belongs
        raise ValueError(f"--data is missing: write --data {spec} with your folder as DIR")
    is_text = kind == "text" or (kind == "hub" and ":" in place)
    _check(spec, kind, is_text, task, words, classes, noise)
    audio: dict[str, Any] = {"seed": seed, "noise": noise, "device": device, "cache_dir": cache_dir}
    if is_text:
        return _load_text(spec, kind, place, task)
    match kind:
        case "japanese-vowels":
            from str_triton.rnn.data.japanese_vowels import load_japanese_vowels

            return load_japanese_vowels(noise=noise, device=device)
        case "har":
            from str_triton.rnn.data.har import load_har

            return load_har(place, classes=6 if classes is None else classes, noise=noise, device=device)
        case "hub":
            from str_triton.rnn.data.hub import load_hub

            return load_hub(place, words=words, **audio)
        case "spoken":
            from str_triton.rnn.data.spoken import load_spoken

            return load_spoken(words_of(place), **audio)
        case "speech-commands":
            from str_triton.rnn.data.speech_commands import load_speech_commands

            return load_speech_commands(place, words=words, **audio)
        case _:
            raise NotImplementedError(f"{kind} is in KNOWN, and load has no case for it")


def _load_text(spec: str, kind: str, place: str, task: str) -> Data | Text:
    """Read a text: of the hub, of a file, or Python's own help."""
    from str_triton.rnn.data.text import load_snippets, load_text, split_text

    if kind == "hub":
        from str_triton.rnn.data.hub import hub_text

        return split_text(hub_text(place), spec)
    return load_text(place or None) if task == "lm" else load_snippets(place or None)


def _check(
    spec: str, kind: str, is_text: bool, task: str, words: tuple[str, ...] | None, classes: int | None, noise: float
) -> None:
    """Raise ValueError for an argument that does not fit the data."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
    if task == "lm" and not is_text:
        raise ValueError(f"task 'lm' needs text; for {spec!r} use task 'classify'")
    if task == "classify" and is_text and kind == "hub":
        raise ValueError(f"{spec!r} is text without labels: use task 'lm'")
    if words is not None and (is_text or kind not in ("speech-commands", "hub")):
        raise ValueError(f"words can be chosen only for speech-commands:DIR and hub:NAME, not for {spec!r}")
    if classes is not None and kind != "har":
        raise ValueError(f"--classes {classes}, of an option or the recipe, is only for har:PATH, not for {spec!r}")
    if noise and is_text:
        raise ValueError(f"noise {noise} can be added only to vectors, and {spec!r} is text")
