"""interface.json: what is written is read again, and everything else is refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from str_triton.training.interface import ImageInput, Interface

FULL = Interface(("a", "b"), ((1.0, 2.5, 3.0), (1.0, 0.5, 2.0)), ImageInput(3, 20, 30, 0.875))


@pytest.mark.parametrize("interface", [FULL, Interface(("x",)), Interface(("a", "b"), ((0.0,), (1e-3,)))])
def test_all_forms_are_read_again(interface: Interface, tmp_path: Path) -> None:
    (tmp_path / "interface.json").write_text(interface.text())
    assert Interface.read(tmp_path / "interface.json") == interface
    assert Interface.of(interface.record()) == interface
    assert Interface.in_metadata({"model": "x"} | interface.texts(), "x") == interface
    assert Interface.in_metadata({"model": "x"} | interface.record(), "x") == interface
    assert Interface.in_metadata({"model": "x"}, "x") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": {"a": 1}}, "names of its scores"),
        ({"outputs": []}, "names of its scores"),
        ({"outputs": ["a", 1]}, "names of its scores"),
        ({"outputs": ["a", "b", "a"]}, "two of its scores .* 'a'"),
        ({"standardisation": {"mean": [1.0]}}, "no std"),
        ({"standardisation": {"mean": [1.0], "std": [0.0]}}, "its deviations are not 1 numbers"),
        ({"standardisation": {"mean": [float("nan")], "std": [1.0]}}, "its means are not 1 numbers"),
        ({"standardisation": {"mean": [1.0], "std": [1.0, 1.0]}}, "its deviations are not 1 numbers"),
        ({"standardisation": {"mean": 1.0, "std": 1.0}}, "lists of numbers"),
        ({"images": {"channels": 3, "height": 20}}, "channels, height and width"),
        ({"images": {"channels": 2, "height": 20, "width": 20}}, "2 x 20 x 20"),
        ({"images": {"channels": 3, "height": 0, "width": 20}}, "3 x 0 x 20"),
        ({"images": {"channels": 3, "height": 20, "width": 16000}}, "16000.* 1 to 4096"),
        ({"images": {"channels": 3, "height": 20, "width": 20, "crop": 1.5}}, "1.5"),
        ({"images": {"channels": 3, "height": 20, "width": 20, "resize": "bicubic"}}, "'bicubic'"),
    ],
)
def test_a_damaged_interface_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Interface.of(FULL.record() | change)
    with pytest.raises(ValueError, match=rf"^file\.bin: .*{message}"):
        Interface.in_metadata(FULL.record() | change, "file.bin")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Interface(("b", "a"), FULL.standardisation, FULL.images), "output 0 was 'a', and is 'b' now"),
        (Interface(("a",), FULL.standardisation, FULL.images), "output 1 was 'b', and is missing now"),
        (Interface(("a", "b", "c"), FULL.standardisation, FULL.images), "output 2 was missing, and is 'c' now"),
        (Interface(("a", "b")), r"feature 0 were 1 and 1, and are missing"),
        (Interface(("a", "b"), ((1.0, 2.51, 3.0), (1.0, 0.5, 2.0)), FULL.images), "feature 1"),
        (Interface(("a", "b"), ((1.0, 2.5, 3.0), (1.0, 0.5, 2.1)), FULL.images), "feature 2"),
        (Interface(("a", "b"), FULL.standardisation, ImageInput(3, 20, 30, None)), "30, of the central .* whole image"),
    ],
)
def test_the_first_change_is_named(now: Interface, message: str) -> None:
    assert FULL.change(FULL) is None
    assert re.search(message, FULL.change(now))


def test_accents_in_either_form_are_no_change() -> None:
    assert Interface(("caf\u00e9",)).change(Interface(("cafe\u0301",))) is None
    assert Interface(("caf\u00e9",)).change(Interface(("cafe",))) is not None


def test_rounding_is_no_change() -> None:
    means, deviations = (1.0001, 2.5001, 3.0001), (1.0001, 0.5001, 2.0001)
    assert FULL.change(Interface(FULL.outputs, (means, deviations), FULL.images)) is None
    stamps = Interface(("a",), ((1e9,), (1.0,)))  # float32 has steps of 64 there
    assert stamps.change(Interface(("a",), ((1e9 + 64,), (1.0,)))) is None


def test_other_values_are_refused(tmp_path: Path) -> None:
    for value in (None, [], "x", {"outputs": ["a"]}):
        with pytest.raises(ValueError, match="outputs"):
            Interface.of(value)
    for text in ("", "{", "[" * 100_000):
        (tmp_path / "i.json").write_text(text)
        with pytest.raises(ValueError, match=r"i\.json: it is empty, cut short .* restore"):
            Interface.read(tmp_path / "i.json")
    with pytest.raises(ValueError, match="x: "):
        Interface.in_metadata({"outputs": "no JSON"}, "x")
