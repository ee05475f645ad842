"""JSON that anybody may have written becomes dataclasses, or a ValueError of one line."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from str_triton.deploy.typed_json import DEEPEST, LARGEST, loads, typed
from tests.messages import holding


@dataclass(frozen=True)
class Inner:
    name: str
    share: float | None = None


@dataclass(frozen=True)
class Other:
    same_as: str


@dataclass(frozen=True)
class Outer:
    count: int
    kind: Literal["a", "b"]
    pair: tuple[int, str]
    sizes: tuple[int, ...]
    inner: dict[str, Other | Inner]
    flags: list[bool]
    rest: Any = None


WHOLE = {
    "count": LARGEST,
    "kind": "b",
    "pair": [0, "x"],
    "sizes": [1, 2, 3],
    "inner": {"p": {"name": "n", "share": 1}, "q": {"same_as": "p"}, "r": {"name": "m", "share": None}},
    "flags": [True, False],
    "rest": {"anything": [None, -1.5]},
}


def test_every_kind_of_field():
    made = typed(Outer, WHOLE, "x")
    assert made == Outer(
        *(LARGEST, "b", (0, "x"), (1, 2, 3)),
        {"p": Inner("n", 1.0), "q": Other("p"), "r": Inner("m")},
        [True, False],
        {"anything": [None, -1.5]},
    )
    assert type(made.inner["p"].share) is float
    assert typed(Outer, {key: value for key, value in WHOLE.items() if key != "rest"}, "x").rest is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "x.count .. whole number from 0 to"),
        ({"count": LARGEST + 1}, "x.count .. whole number"),
        ({"count": True}, "x.count .. whole number from 0 to 9223372036854775807 .. got True"),
        ({"count": 1.0}, "x.count .. whole number"),
        ({"count": "1"}, "x.count .. whole number"),
        ({"kind": "c"}, "x.kind .. a, b .. got 'c'"),
        ({"kind": ["a"]}, "x.kind .. a, b"),
        ({"kind": None}, "x.kind .. a, b"),
        ({"pair": [0]}, "x.pair .. list of 2"),
        ({"pair": [0, 0]}, "x.pair[1] .. text .. got 0"),
        ({"pair": "ab"}, "x.pair .. list of 2"),
        ({"sizes": {"0": 1}}, "x.sizes .. list"),
        ({"inner": []}, "x.inner .. object"),
        ({"inner": {"p": []}}, "x.inner['p'] .. object .. got []"),
        ({"inner": {"p": {}}}, "x.inner['p'] .. 'name' is missing"),
        ({"inner": {"p": {"name": "n", "same_as": "q"}}}, "x.inner['p'] .. 'same_as' is unknown"),
        ({"inner": {"p": {"name": "n", "share": "half"}}}, "x.inner['p'].share .. number .. got 'half'"),
        ({"inner": {"\x1b\n": {}}}, r"x.inner['\x1b\n'] .. 'name' is missing"),
        ({"flags": [1]}, "x.flags[0] .. true or false .. got 1"),
        ({"flags": None}, "x.flags .. list .. got None"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=holding(message)) as error:
        typed(Outer, WHOLE | change, "x")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [None, 1, [], "text"])
def test_an_object_is_needed(value: Any):
    with pytest.raises(ValueError, match=r"^x: expected an object"):
        typed(Outer, value, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        (b"\xff", "not JSON"),
        ("[" * 100_000 + "]" * 100_000, "not JSON"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper"),
        ('{"a":' * (DEEPEST + 1) + "0" + "}" * (DEEPEST + 1), "nested deeper"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e999]", "1e999"),
        (f"[{'9' * 5000}]", "digits"),
        (r'["\ud800"]', r"'\\ud800'.* Unicode"),
        (r'{"\udfff": 1}', "not Unicode"),
    ],
)
def test_what_only_pythons_reader_takes_is_refused(text: str | bytes, message: str):
    with pytest.raises(ValueError, match=message):
        loads(text)


def test_everything_else_is_read():
    value = loads(r'{"a": [1, -2.5e3, "\u00e9\ud83d\ude00", null, true]}')
    assert value == {"a": [1, -2500.0, "\u00e9\U0001f600", None, True]}
    assert loads('{"a":' * DEEPEST + "0" + "}" * DEEPEST)
    assert loads('"text"') == "text"
    deepest = loads("[" * DEEPEST + "]" * DEEPEST)
    for _ in range(DEEPEST - 1):
        (deepest,) = deepest
    assert deepest == []
