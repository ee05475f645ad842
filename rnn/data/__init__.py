"""Sequences for training and testing: `load` reads a data set by its name.

The modules of the data sets are imported when one is asked for, so that no set needs another's libraries.
"""

import torch

from rnn.data.common import Data, Examples, Merged, Text, with_validation

__all__ = ["Data", "Examples", "Merged", "Text", "load", "with_validation"]

KNOWN = (
    "japanese-vowels, speech-commands:DIR, hub:NAME, hub:NAME:COLUMN (text), spoken:WORD,WORD,..., har:PATH, "
    "text, text:FILE"
)
BARE = ("japanese-vowels", "text")
WITH_A_PLACE = ("speech-commands", "hub", "spoken", "har", "text")
TASKS = ("classify", "lm")


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
    - "speech-commands:DIR": a folder of words as the Speech Commands are published, see `load_speech_commands`;
    - "hub:NAME": the same from the Hugging Face hub; "hub:NAME:COLUMN" a column of text, for task "lm" only;
    - "spoken:WORD,WORD,...": these words, spoken by a speech synthesiser, see `load_spoken`;
    - "har:PATH": the UCI HAR folder or zip file, see `load_har`;
    - "text" and "text:FILE": Python's own help or a file, see `load_text` (task "lm") and `load_snippets` ("classify").

    task "classify" gives `Data`, "lm" `Text`. `words` (for the speech commands) are the words to tell apart, `classes`
    (for har) is 6 or 2, `noise` the standard deviation of noise on standardised input vectors, `seed` decides what
    is made up ("spoken"), `device` where features are kept or computed, `cache_dir` where what is computed once stays.

    Raises ValueError or OSError with one line that names what is wrong with the data or does not go together.
    """
    kind, _, place = spec.partition(":")
    if spec not in BARE and not (kind in WITH_A_PLACE and place):
        raise ValueError(f"unknown data {spec!r}; known are {KNOWN}")
    of_text = kind == "text" or (kind == "hub" and ":" in place)
    _check(spec, kind, of_text, task, words, classes, noise)
    audio = {"seed": seed, "noise": noise, "device": device, "cache_dir": cache_dir}
    match kind:
        case "japanese-vowels":
            from rnn.data.japanese_vowels import load_japanese_vowels

            return load_japanese_vowels(noise=noise, device=device)
        case "har":
            from rnn.data.har import load_har

            return load_har(place, classes=6 if classes is None else classes, noise=noise, device=device)
        case "text":
            from rnn.data.text import load_snippets, load_text

            return load_text(place or None) if task == "lm" else load_snippets(place or None)
        case "hub" if of_text:
            from rnn.data.hub import hub_text
            from rnn.data.text import as_text

            return as_text(hub_text(place), spec)
        case "hub":
            from rnn.data.hub import load_hub

            return load_hub(place, words=words, **audio)
        case "spoken":
            from rnn.data.spoken import load_spoken

            return load_spoken(tuple(place.split(",")), **audio)
        case _:
            from rnn.data.speech_commands import load_speech_commands

            return load_speech_commands(place, words=words, **audio)


def _check(
    spec: str, kind: str, of_text: bool, task: str, words: tuple[str, ...] | None, classes: int | None, noise: float
) -> None:
    """Refuse what does not go together with the data."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
    if task == "lm" and not of_text:
        raise ValueError(f"task 'lm' is for text; {spec!r} can only be classified")
    if task == "classify" and of_text and kind == "hub":
        raise ValueError(f"{spec!r} is text without labels: use task 'lm'")
    if words is not None and (of_text or kind not in ("speech-commands", "hub")):
        raise ValueError(f"words are chosen from speech-commands:DIR and hub:NAME; {spec!r} does not take them")
    if classes is not None and kind != "har":
        raise ValueError(f"a number of classes is for har:PATH; {spec!r} does not take one")
    if noise and of_text:
        raise ValueError(f"noise {noise} is for vectors; {spec!r} is text and does not take it")
